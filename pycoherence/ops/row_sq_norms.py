"""Squared norms of the rows of several matrices, in one launch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import OpSpec
from pycoherence.ops.family.reduce import check_factors, randn


def row_sq_norms(rows: Sequence[Tensor]) -> Tensor:
    r"""Squared norms of the rows of matrices that have rows of the same examples.

    .. math:: N_{ib} = \sum_j \mathrm{rows}_{i,bj}^2

    With one position `G_b = g_b x_b^T`, so that `||G_b||^2 = ||g_b||^2 ||x_b||^2`: this gives the
    norms of all such layers of a network at once.

    Scaling: None; the matrices are taken as they are.

    Args:
        rows: Matrices `[B, n_i]`, float16/bfloat16/float32/float64, any strides, of one dtype, on
            one device; at least one.

    Returns:
        `[len(rows), B]`, always float64: squares may leave the range of float32, and products of
        two of them come back.

    Raises:
        ValueError: No matrix is given, or shapes disagree.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: One read of the matrices; on a GPU (native) one launch for 64 of them. The CPU's kernel
    copies matrices whose rows lie apart or are of half precision, one at a time, and the reference
    path a workspace full of each.

    Source: Goodfellow 2015, arXiv:1510.01799.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.ops.row_sq_norms([torch.ones(2, 3), torch.tensor([[2.0], [0.0]])])
        tensor([[3., 3.],
                [4., 0.]], dtype=torch.float64)
    """
    return call("row_sq_norms", list(rows))


def _check(rows: Sequence[Tensor]) -> None:
    if not rows or any(x.dim() != 2 or len(x) != len(rows[0]) for x in rows):
        raise ValueError(
            "row_sq_norms: expected one or more matrices [B, n] with as many rows each, got "
            f"{[tuple(x.shape) for x in rows]}"
        )
    check_factors("row_sq_norms", **{f"rows[{i}]": x for i, x in enumerate(rows)})


def _reference(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([_sq_norms(x) for x in rows])


def _sq_norms(x: Tensor) -> Tensor:
    def squares(part: slice) -> Tensor:
        return x[part].double().square().sum(1)

    return Chunks.of(squares, len(x), x.shape[1], torch.float64).joined()


def _fake(rows: Sequence[Tensor]) -> Tensor:
    return rows[0].new_empty((len(rows), len(rows[0])), dtype=torch.float64)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Sequence[Tensor]]]:
    for batch, sizes in ((5, [33, 1, 0, 300]), (1, [1]), (0, [3, 4]), (3, [7] * 70), (9, [4100])):
        yield ([randn(batch, n, device=device, dtype=dtype, seed=n) for n in sizes],)
    x = randn(18, 10, device=device, dtype=dtype)
    yield ([x.mT[:, ::3], x[:10, 1:], x[:1].mT.expand(10, 6)],)


SPEC = register(
    OpSpec(
        schema="row_sq_norms(Tensor[] rows) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        samples=_samples,
    )
)
