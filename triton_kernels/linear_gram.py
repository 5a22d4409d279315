"""Triton kernels of `linear_gram`: products of two Grams, or tiles of gradients."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops._chunks import products
from pycoherence.ops._spec import accumulate_dtype
from pycoherence.ops._workspace import workspace
from pycoherence.triton_kernels._factors import Factors, materialise
from pycoherence.triton_kernels._products import gram_of_products, mirrored


def linear_gram(
    x1: Tensor, g1: Tensor, x2: Tensor | None = None, g2: Tensor | None = None
) -> Tensor:
    """As `pycoherence.ops.linear_gram`, of arguments that are checked."""
    pairs = [(x1, g1)] if x2 is None or g2 is None else [(x1, g1), (x2, g2)]
    acc = accumulate_dtype(x1.dtype)
    if any(not x.numel() or not g.numel() for x, g in pairs):
        return x1.new_zeros((len(pairs[0][0]), len(pairs[-1][0])), dtype=acc)
    (b1, t1, i), (b2, t2, _), o = pairs[0][0].shape, pairs[-1][0].shape, g1.shape[2]
    if products_are_cheaper((b1, t1), (b2, t2) if len(pairs) > 1 else None, i, o, x1.dtype):
        return gram_of_products(*(factor for pair in pairs for factor in pair))
    return _gram_of_tiles(pairs)


def products_are_cheaper(
    one: tuple[int, int],
    two: tuple[int, int] | None,
    i: int,
    o: int,
    dtype: torch.dtype,
) -> bool:
    """Whether to multiply Grams of the factors, rather than gradients.

    Counted in multiply-adds, `B1 T1 B2 T2 (I + O)`, half of it for a batch with itself, against
    `I O (B1 T1 + B2 T2)` for the gradients and `I O B1 B2` for their products. The last are of
    float32 even if factors are half, and take that much longer.

    Args:
        one: Examples and positions of the first batch.
        two: Of the second; `None` for the first with itself.
        i: Input features.
        o: Output features.
        dtype: Of the factors.
    """
    (b1, t1), (b2, t2) = one, two or one
    if t1 == t2 == 1:
        return True
    gradients = b1 * t1 + (b2 * t2 if two else 0)
    slower = 8 if dtype.itemsize == 2 else 1
    tiles = i * o * (gradients + slower * b1 * b2)
    return b1 * t1 * b2 * t2 * (i + o) * (1 if two else 0.5) < tiles


def _gram_of_tiles(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Parts of the gradients, as many of their elements as fit the workspace, times themselves."""
    acc = accumulate_dtype(pairs[0][0].dtype)
    batches = sum(len(x) for x, _ in pairs)
    gram = torch.zeros((len(pairs[0][0]), len(pairs[-1][0])), dtype=acc, device=pairs[0][0].device)
    room = workspace() // (batches * acc.itemsize)
    for rows, columns in _parts(pairs[0][1].shape[2], pairs[0][0].shape[2], room):
        parts = [materialise(Factors.of_linear(x[..., columns], g[..., rows])) for x, g in pairs]
        gram += products(parts[0], parts[-1])
    return mirrored(gram) if len(pairs) == 1 else gram


def _parts(o: int, i: int, room: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a weight, in parts of up to `room` elements and about as tall as wide."""
    wide = min(i, max(1, math.isqrt(room), room // o))
    if 16 < wide < i:
        wide -= wide % 16  # so that the parts begin where their wide loads may
    tall = min(o, max(1, room // wide))
    for row in range(0, o, tall):
        for column in range(0, i, wide):
            yield slice(row, row + tall), slice(column, column + wide)
