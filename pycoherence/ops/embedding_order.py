"""Robust aggregates of per-example gradients of an embedding table."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.embedding_reduce import (
    check,
    heads,
    like,
    materialise,
    resolve_padding_idx,
    touched,
)
from pycoherence.ops.family.order import order, order_reference, order_spec
from pycoherence.ops.family.reduce import randn


def embedding_order(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    rule: str,
    k: float = 0,
    *,
    padding_idx: int | None = None,
    nonfinite: str = "nan",
) -> Tensor:
    r"""A robust aggregate of the per-example gradients of an embedding table, by coordinate.

    .. math:: A_{vd} = \mathrm{rule}_k(G_{1vd}, \dots, G_{Bvd}), \qquad
        G_b[v] = \sum_{t :\, id_{bt} = v} g_{bt} \in \mathbb{R}^{D}

    An example that does not look a row up has zeros there, and these count as values: a row that
    at most `k` examples look up is not moved by `trimmed_mean` or `winsorized_mean`, and one that
    fewer than half of them do is not moved by `median`. The rules are those of `dense_order`.

    Scaling: See `linear_order`.

    Args:
        ids: Looked-up rows, `[B, T]`, int32 or int64, in `[0, num_embeddings)`, any strides.
        g: Gradient with respect to the looked-up vectors, `[B, T, D]`, floating, any strides.
        num_embeddings: `V`, the number of rows of the table.
        rule: Name of the rule, as of `dense_order`.
        k: Its number, as of `dense_order`.
        padding_idx: Row in `[0, V)` that receives no gradient, or `None`.
        nonfinite: Effect of NaN and Inf in a `G_b`, as of `dense_order`: `"nan"` or `"drop"`.

    Returns:
        `[V, D]`, float32, or float64 for float64 inputs. Zero-length `B` or `T` gives zeros.

    Raises:
        ValueError: Shapes disagree, `padding_idx` is out of range, the rule is unknown, `k` is out
            of its range, or `nonfinite` is neither of the two.
        TypeError: A dtype or device does not fit.
        IndexError: An id is out of range. On a GPU (native) an assertion on the device fails, as
            for torch's own lookups.

    Cost: On the reference path a sort of `B` values for each coordinate of the rows that the batch
    looks up, some rows at a time (the workspace, or one). On a GPU (native) ids are sorted, without
    other workspace than for factors in half precision, which are converted; 32 to 128 columns of a
    row are a block's, which adds up the lookups of each example in shared memory. There they stay
    for batches of up to 384, for means of few clipped values of up to 96 (half of that in float64);
    of a larger batch they are added up anew whenever `dense_order` would read them.

    Source: See `dense_order`.

    Example:
        >>> import torch, pycoherence as pc
        >>> ids, g = torch.tensor([[0, 0], [0, 1], [0, 1]]), torch.ones(3, 2, 2)
        >>> pc.ops.embedding_order(ids, g, 3, "median")
        tensor([[1., 1.],
                [1., 1.],
                [0., 0.]])
    """
    padding = resolve_padding_idx("embedding_order", padding_idx, num_embeddings)
    head = (ids, g, num_embeddings, padding)
    return order("embedding_order", *head, rule=rule, k=k, nonfinite=nonfinite)


def _reference(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int, *tail: Any) -> Tensor:
    used, local = touched("embedding_order", ids, num_embeddings)
    padded = ids == padding_idx

    def rows(part: slice) -> Chunks:
        elsewhere = padded | (local < part.start) | (local >= part.stop)
        index = (local - part.start).masked_fill(elsewhere, 0)
        return materialise(index, g, elsewhere, part.stop - part.start)

    found = order_reference(rows, g, (len(used), g.shape[2]), *tail)
    # No rule makes anything but zero of zeros.
    return found.new_zeros(num_embeddings, g.shape[2]).index_copy_(0, used, found)


def _heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield from heads(device, dtype)
    ids = torch.randint(4, (20, 3), generator=torch.Generator().manual_seed(0)).to(device)
    yield ids, randn(20, 3, 5, device=device, dtype=dtype), 4, -1


SPEC = register(
    order_spec(
        "embedding_order(Tensor ids, Tensor g, SymInt num_embeddings, SymInt padding_idx",
        check=check,
        like=like,
        reference=_reference,
        heads=_heads,
    )
)
