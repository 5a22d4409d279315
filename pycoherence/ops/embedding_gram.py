"""Dot products of per-example gradients of an embedding table."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.embedding_reduce import check_lookups, materialise
from pycoherence.ops.family.gram import gram_spec
from pycoherence.ops.family.reduce import randn


def embedding_gram(
    ids1: Tensor,
    g1: Tensor,
    ids2: Tensor | None = None,
    g2: Tensor | None = None,
    *,
    padding_idx: int | None = None,
) -> Tensor:
    r"""All dot products of per-example gradients of an embedding table.

    .. math:: K_{bc} = \langle G_b, G'_c \rangle
        = \sum_{t, s :\, id_{bt} = id'_{cs}} \langle g_{bt}, g'_{cs} \rangle

    where `G` are the gradients of the first batch and `G'` those of the second. The size of the
    table does not matter.

    Scaling: as `linear_gram`.

    Args:
        ids1: Rows that the first batch looks up, `[B1, T1]`, int32 or int64, not negative, any
            strides.
        g1: Gradient with respect to the looked-up vectors, `[B1, T1, D]`, floating, any strides.
        ids2: Rows that the second batch looks up, `[B2, T2]`; `T2` may differ from `T1`. The first
            batch itself if `None`.
        g2: Gradient with respect to its vectors, `[B2, T2, D]`; given if and only if `ids2` is.
        padding_idx: Row that receives no gradient, not negative, or `None`.

    Returns:
        `[B1, B2]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes disagree, `padding_idx` is negative, or one of `ids2` and `g2` is
            missing.
        TypeError: A dtype or device does not fit.
        IndexError: An id is negative. On a GPU (native) an assertion on the device fails, as for
            torch's own lookups.

    Cost: On the reference path `2 B1 B2 U D`, where `U` rows are touched by any example, and a
    workspace full of gradients `[U, D]` of each batch. On a GPU (native) ids are sorted, each pair
    of examples takes `O(T log T)` to find the ids that both look up and `2 D` for each of these
    (half the pairs for a batch with itself), and the workspace is full of `[B, T, D]`, some columns
    at a time.

    Source: See `linear_gram`.

    Example:
        >>> import torch, pycoherence as pc
        >>> ids, g = torch.tensor([[0, 0], [0, 1]]), torch.ones(2, 2, 3)
        >>> pc.ops.embedding_gram(ids, g)
        tensor([[12.,  6.],
                [ 6.,  6.]])
    """
    if padding_idx is not None and padding_idx < 0:
        raise ValueError(f"embedding_gram: expected padding_idx >= 0, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx
    return call("embedding_gram", ids1, g1, ids2, g2, padding)


def _shape(ids: Tensor, g: Tensor, padding_idx: int) -> tuple[int]:
    return (g.shape[2],)


def _materialise(
    ids1: Tensor, g1: Tensor, ids2: Tensor, g2: Tensor, padding_idx: int
) -> tuple[Chunks, Chunks]:
    ids = torch.cat([ids1.flatten().long(), ids2.flatten().long()])
    used, local = torch.unique(ids, return_inverse=True)
    if used.numel() and used[0] < 0:
        raise IndexError(f"embedding_gram: expected ids >= 0, got {used[0]}")
    first, second = local.split([ids1.numel(), ids2.numel()])
    return (
        materialise(first.view(ids1.shape), g1, ids1 == padding_idx, len(used)),
        materialise(second.view(ids2.shape), g2, ids2 == padding_idx, len(used)),
    )


def _pairs(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for b1, b2, t1, t2, v, d, padding in (
        (3, 2, 17, 9, 11, 5, -1),
        (3, 4, 9, 9, 4, 7, 2),
        (5, 3, 1, 1, 6, 3, 0),
        (1, 1, 1, 1, 1, 1, -1),
        (0, 2, 3, 2, 4, 5, -1),
        (4, 2, 0, 3, 3, 2, 1),
    ):
        factors = []
        for b, t, seed in ((b1, t1, 0), (b2, t2, 3)):
            ids = torch.randint(v, (b, t), generator=generator).to(device)
            factors += [ids, randn(b, t, d, device=device, dtype=dtype, seed=seed)]
        yield *factors, padding
    ids = torch.randint(5, (2, 4, 6), generator=generator, dtype=torch.int32).to(device).mT
    g1, g2 = (randn(6, 8, 3, device=device, dtype=dtype, seed=s)[:, ::2] for s in (0, 3))
    yield ids[0], g1, ids[1], g2, -1


SPEC = register(
    gram_spec(
        "embedding_gram",
        "ids",
        ", SymInt padding_idx",
        check=check_lookups,
        shape=_shape,
        materialise=_materialise,
        pairs=_pairs,
    )
)
