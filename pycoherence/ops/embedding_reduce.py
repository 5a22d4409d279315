"""Reductions over per-example gradients of an embedding table."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.outputs import Reduced, mask, unpack
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.family.reduce import check_factors, randn, reduce_reference, reduce_spec


def embedding_reduce(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    want: Sequence[str] = ("sq_norms",),
) -> Reduced:
    r"""Reductions over the per-example gradients of an embedding table, without keeping them.

    .. math:: G_b[v] = \sum_{t :\, id_{bt} = v} g_{bt} \in \mathbb{R}^{D}

    Scaling: as `linear_reduce`.

    Args:
        ids: Looked-up rows, `[B, T]`, int32 or int64, in `[0, num_embeddings)`, any strides.
        g: Gradient with respect to the looked-up vectors, `[B, T, D]`, floating, any strides.
        num_embeddings: `V`, the number of rows of the table.
        padding_idx: Row in `[0, V)` that receives no gradient, or `None`.
        coef: `[B]`, the weights of `weighted_sum`; ones if `None`.
        direction: `[V, D]`, what `dots` are taken with.
        want: Names of the outputs to compute, fields of `Reduced`.

    Returns:
        `Reduced`, with `None` for what was not wanted. Zero-length `B` or `T` gives empty or zeros.

    Raises:
        ValueError: Shapes disagree, `padding_idx` is out of range, `want` names no output, or
            `coef`/`direction` do not fit it.
        TypeError: A dtype or device does not fit.
        IndexError: An id is out of range. On a GPU (native) an assertion on the device fails, as
            for torch's own lookups.

    Cost: `O(BTD)` time, plus `O(B U D)` on the reference path, where `U <= BT` rows are touched by
    the batch; `[V, D]` is only written for parameter-shaped outputs. On a GPU (native) ids are
    sorted, and `g` is read once, for `sum_dots` once more: a warp takes the lookups of an id, or of
    an id by an example where only `sq_norms` or `dots` are wanted, and a block those of an id with
    more than 64. The workspace is `[B, T]`, for each output per example `B T D / 128`, and that of
    `embedding_gram` for `gram`.

    Source: Kong and Munoz Medina 2023 (NeurIPS), for the norms.

    Example:
        >>> import torch, pycoherence as pc
        >>> ids, g = torch.tensor([[0, 0], [0, 1]]), torch.ones(2, 2, 3)
        >>> pc.ops.embedding_reduce(ids, g, num_embeddings=4).sq_norms
        tensor([12.,  6.])
    """
    padding = resolve_padding_idx("embedding_reduce", padding_idx, num_embeddings)
    out = call("embedding_reduce", ids, g, num_embeddings, padding, coef, direction, mask(want))
    return unpack(out)


def resolve_padding_idx(op: str, padding_idx: int | None, num_embeddings: int) -> int:
    """The row as the schemas have it, -1 for none."""
    if padding_idx is None:
        return -1
    if not 0 <= padding_idx < num_embeddings:
        raise ValueError(f"{op}: expected padding_idx in [0, {num_embeddings}), got {padding_idx}")
    return padding_idx


def check(op: str, ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> None:
    """Check the factors of one batch and the size of the table."""
    check_lookups(op, ids, g, padding_idx)
    if num_embeddings < 0:
        raise ValueError(f"{op}: expected num_embeddings >= 0, got {num_embeddings}")


def check_lookups(op: str, ids: Tensor, g: Tensor, padding_idx: int) -> None:
    """Check the factors of one batch."""
    if ids.dim() != 2 or g.dim() != 3 or ids.shape != g.shape[:2]:
        raise ValueError(
            f"{op}: expected ids [B, T] and g [B, T, D], got {tuple(ids.shape)} and "
            f"{tuple(g.shape)}; flatten positions into T, or unsqueeze(1) if there are none"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.device != g.device:
        raise TypeError(
            f"{op}: expected ids to be int32 or int64 on {g.device}, "
            f"got {ids.dtype} on {ids.device}"
        )
    check_factors(op, g=g)


def like(
    ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int
) -> tuple[Tensor, tuple[int, int]]:
    """The output gradient and the shape of the table."""
    return g, (num_embeddings, g.shape[2])


def touched(op: str, ids: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """The rows that any example looks up, and `ids` as indices into them.

    Rows that no example touches have zero gradient, so only these are materialised.
    """
    used, local = torch.unique(ids.long(), return_inverse=True)
    if used.numel() and not (used[0] >= 0 and used[-1] < num_embeddings):
        raise IndexError(
            f"{op}: expected ids in [0, {num_embeddings}), got ids from {used[0]} to {used[-1]}"
        )
    return used, local


def materialise(ids: Tensor, g: Tensor, padded: Tensor, rows: int) -> Chunks:
    """The gradients of one batch.

    Args:
        ids: `[B, T]`, in `[0, rows)`.
        g: `[B, T, D]`.
        padded: `[B, T]`, the lookups that give no gradient.
        rows: Number of rows of the table.
    """
    acc = accumulate_dtype(g.dtype)

    def gradients(part: slice) -> Tensor:
        # In float64: the lookups of an id are added up one after the other.
        values = g[part].double().masked_fill(padded[part].unsqueeze(-1), 0)
        index = ids[part].unsqueeze(-1).expand_as(values)
        table = values.new_zeros(len(values), rows, g.shape[2])
        return table.scatter_add_(1, index, values).to(acc)  # [b, rows, D]

    def present(part: slice) -> Tensor:
        found = (~padded[part]).long()
        seen = found.new_zeros(len(found), rows).scatter_add_(1, ids[part], found)
        return seen.unsqueeze(-1) > 0

    return Chunks.of(gradients, g.shape[0], rows * g.shape[2], acc, present)


def _reference(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    padding_idx: int,
    coef: Tensor | None,
    direction: Tensor | None,
    want: int,
) -> tuple[Tensor | None, ...]:
    used, local = touched("embedding_reduce", ids, num_embeddings)
    shape, part = (len(used), g.shape[2]), None if direction is None else direction[used]
    chunks = materialise(local, g, ids == padding_idx, len(used))
    reduced = unpack(reduce_reference(chunks, g, shape, coef, part, want))
    for name in ("weighted_sum", "second_moment", "sign_sum"):
        rows = getattr(reduced, name)
        if rows is not None:
            table = rows.new_zeros(num_embeddings, shape[1]).index_copy_(0, used, rows)
            reduced = reduced._replace(**{name: table})
    return tuple(reduced)


def heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Sample factors, with their options."""
    generator = torch.Generator().manual_seed(0)
    for b, t, v, d, padding in (
        (3, 17, 11, 5, -1),
        (3, 9, 4, 7, 2),
        (5, 1, 6, 3, 0),
        (1, 1, 1, 1, -1),
        (0, 3, 4, 5, -1),
        (4, 0, 3, 2, 1),
    ):
        ids = torch.randint(v, (b, t), generator=generator).to(device)
        yield ids, randn(b, t, d, device=device, dtype=dtype), v, padding
    ids = torch.randint(5, (4, 6), generator=generator, dtype=torch.int32).to(device)
    yield ids.mT, randn(6, 8, 3, device=device, dtype=dtype)[:, ::2], 5, -1


SPEC = register(
    reduce_spec(
        "embedding_reduce(Tensor ids, Tensor g, SymInt num_embeddings, SymInt padding_idx",
        check=check,
        like=like,
        reference=_reference,
        heads=heads,
    )
)
