"""Dot products of gradients of a linear layer's weight: of two Grams, or of tiles of gradients."""

import math

import torch
from torch import Tensor

from pycoherence.ops.core.workspace import workspace
from pycoherence.ops.family.gram import gram_fake
from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.ghost.gram import gram_of_products
from pycoherence.triton_kernels.rows.materialised import gram_of_tiles


def linear_gram(
    x1: Tensor, g1: Tensor, x2: Tensor | None = None, g2: Tensor | None = None
) -> Tensor:
    """The output of `linear_gram`, as its schema says; exactly symmetric for a batch with itself.

    Its errors stay below 1e-5 of the largest number, 1e-12 for float64; gradients of float32 that
    are multiplied out, where that is cheaper, have those of TensorFloat-32 if that is allowed.
    """
    pairs = [(x1, g1)] if x2 is None or g2 is None else [(x1, g1), (x2, g2)]
    if any(not x.numel() or not g.numel() for x, g in pairs):
        return gram_fake(g1, g2).zero_()
    one, two, i, o = x1.shape[:2], pairs[-1][0].shape[:2], x1.shape[2], g1.shape[2]
    if products_are_cheaper(one, None if x2 is None else two, i, o, x1.dtype):
        return gram_of_products(x1, g1, x2, g2)
    return _by_columns(pairs)


def products_are_cheaper(
    one: tuple[int, ...],
    two: tuple[int, ...] | None,
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
        two: Those of the second; `None` for the first with itself.
        i: Input features.
        o: Output features.
        dtype: Dtype of the factors.
    """
    (b1, t1), (b2, t2) = one, two or one
    if t1 == t2 == 1:
        return True
    gradients = b1 * t1 + (b2 * t2 if two else 0)
    slower = 8 if dtype.itemsize == 2 else 1
    tiles = i * o * (gradients + slower * b1 * b2)
    return b1 * t1 * b2 * t2 * (i + o) * (1 if two else 0.5) < tiles


def _by_columns(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """From tiles of gradients about as tall as wide, which read the factors least often."""
    g = pairs[0][1]
    gram = gram_fake(g, pairs[-1][1]).zero_()
    room = workspace(g.device) // (sum(len(x) for x, _ in pairs) * gram.itemsize)
    wide = max(16, math.isqrt(room), room // g.shape[2])
    wide -= wide % 16  # so that wide loads may start where a part does
    for parts in zip(*(x.split(wide, 2) for x, _ in pairs), strict=True):
        some = (Factors.of_linear(part, g) for part, (_, g) in zip(parts, pairs, strict=True))
        gram += gram_of_tiles(*some)
    return gram
