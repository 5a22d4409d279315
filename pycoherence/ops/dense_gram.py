"""Dot products of gradients that are there already, one row for each example."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks, mirrored
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import OpSpec, accumulate_dtype
from pycoherence.ops.family.gram import gram_fake, gram_reference
from pycoherence.ops.family.reduce import check_factors, randn


def dense_gram(a: Tensor, b: Tensor | None = None) -> Tensor:
    r"""All dot products of the rows of one or two matrices.

    .. math:: K_{bc} = \langle a_b, b_c \rangle

    Scaling: as `linear_gram`.

    Args:
        a: One gradient in each row, `[B1, P]`, float16/bfloat16/float32/float64, any strides.
        b: Gradients of the second batch, `[B2, P]`, same dtype and device; `a` itself if `None`.

    Returns:
        `[B1, B2]`, float32, or float64 for float64 inputs; products are added up in that dtype.

    Raises:
        ValueError: Shapes disagree.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: `2 B1 B2 P`, and on the reference path a workspace full of each matrix. On a GPU (triton)
    nothing is converted; partial sums, or what torch copies of rows that lie apart, fit the
    workspace, with at least one `[B1, B2]` or 64 columns.

    Source: See `linear_gram`.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.ops.dense_gram(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        tensor([[ 5., -2.],
                [-2.,  1.]])
    """
    return call("dense_gram", a, b)


def _check(a: Tensor, b: Tensor | None) -> None:
    if a.dim() != 2 or (b is not None and (b.dim() != 2 or b.shape[1] != a.shape[1])):
        got = "" if b is None else f" and b {tuple(b.shape)}"
        raise ValueError(
            f"dense_gram: expected a [B1, P], and b [B2, P] if given, got a {tuple(a.shape)}{got}; "
            "flatten(1) makes rows of gradients"
        )
    check_factors("dense_gram", a=a, **({} if b is None else {"b": b}))


def _rows(a: Tensor) -> Chunks:
    acc = accumulate_dtype(a.dtype)
    return Chunks.of(lambda part: a[part].to(acc), a.shape[0], a.shape[1], acc)


def _reference(a: Tensor, b: Tensor | None) -> Tensor:
    found = gram_reference(_rows(a), _rows(a if b is None else b), gram_fake(a, b))
    return mirrored(found) if b is None else found


def _samples(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for b1, b2, p in ((3, 5, 33), (1, 1, 1), (0, 2, 4), (4, 3, 0), (7, 2, 300)):
        a = randn(b1, p, device=device, dtype=dtype)
        yield a, None
        yield a, randn(b2, p, device=device, dtype=dtype, seed=1)
    a, b = (randn(18, 10, device=device, dtype=dtype, seed=s).mT[::2, ::3] for s in (0, 1))
    yield a, None
    yield a, b


SPEC = register(
    OpSpec(
        schema="dense_gram(Tensor a, Tensor? b) -> Tensor",
        check=_check,
        reference=_reference,
        fake=gram_fake,
        samples=_samples,
    )
)
