"""Norms of gradients that are products of two rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.launch.device import launch
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two

_TILE = 1024


def sq_norms_of_rank_one(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms of `G_b = g_b x_b^T`, `[B]`: one launch that reads `x` and `g` once.

    Numbers are as large and as small as the accumulation dtype holds. Inf times zero is NaN, as it
    is in `G_b`.

    Args:
        x: `[B, 1, I]`, any strides.
        g: `[B, 1, O]`, of the same dtype.
    """
    sq_norms = x.new_empty(len(x), dtype=accumulate_dtype(x.dtype))
    if x.numel() == 0 or g.numel() == 0:
        return sq_norms.zero_()
    wide = max(16, min(_TILE, power_of_two(max(x.shape[2], g.shape[2]))))
    high = _TILE // wide
    double = x.dtype == torch.float64
    launch(
        _sq_norms,
        (cdiv(len(x), high),),
        *(x, g, sq_norms, len(x), x.shape[2], g.shape[2]),
        *(x.stride(0), x.stride(2), g.stride(0), g.stride(2)),
        TILE=(high, wide),
        LARGE=2.0**300 if double else 2.0**40,
        SCALE=2.0**660 if double else 2.0**90,
        warps=8 if double else 4,
    )
    return sq_norms


@triton.jit(do_not_specialize=["B"])
def _sq_norms(
    x,
    g,
    sq_norms,
    B,
    I,
    O,
    x_batch,
    x_stride,
    g_batch,
    g_stride,
    TILE: tl.constexpr,
    LARGE: tl.constexpr,
    SCALE: tl.constexpr,
):
    """A program takes TILE[0] examples: x [B, I], g [B, O], sq_norms [B]."""
    ACC: tl.constexpr = sq_norms.dtype.element_ty
    b = tl.program_id(0) * TILE[0] + tl.arange(0, TILE[0])
    at = b.to(tl.int64)
    one, one_k, one_zero = _norm(x + at * x_batch, x_stride, b < B, I, TILE, LARGE, SCALE, ACC)
    two, two_k, two_zero = _norm(g + at * g_batch, g_stride, b < B, O, TILE, LARGE, SCALE, ACC)
    k = one_k + two_k
    half = tl.where(k > 0, SCALE, tl.where(k < 0, 1 / SCALE, 1.0)).to(ACC)
    # In this order, and half of the scale at a time, only what is out of range leaves it.
    swap = (one > two) == (k > 0)
    result = tl.where(swap, two, one) * half * tl.where(swap, one, two) * half
    result = tl.where(one_k * two_k > 0, result * half * half, result)
    infinity = float("inf")
    undefined = ((one == infinity) & two_zero) | ((two == infinity) & one_zero)
    tl.store(sq_norms + b, tl.where(undefined, float("nan"), result), b < B)


@triton.jit
def _norm(
    rows,
    stride,
    inside,
    N,
    TILE: tl.constexpr,
    LARGE: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Squared norms of rows: `(value, k, zero)`, the norm being `value * SCALE**(2 * k)`.

    Squares of large and of small numbers are added up apart, scaled into range (J. Blue, 1978).
    Whether a row holds a zero is `zero`.
    """
    large = tl.full(TILE, 0, ACC)
    medium = tl.full(TILE, 0, ACC)
    small = tl.full(TILE, 0, ACC)
    zero = tl.full(TILE, 0, tl.int32)
    for start in range(0, N, TILE[1]):
        n = start + tl.arange(0, TILE[1])
        mask = inside[:, None] & (n < N)[None, :]
        value = tl.load(rows[:, None] + n.to(tl.int64)[None, :] * stride, mask, 0).to(ACC)
        size = tl.abs(value)
        is_large, is_small = size > LARGE, size < 1 / LARGE
        scaled = tl.where(is_large, value * (1 / SCALE), tl.where(is_small, value * SCALE, value))
        square = scaled * scaled
        large += tl.where(is_large, square, 0.0)
        medium += tl.where(is_large | is_small, 0.0, square)
        small += tl.where(is_small, square, 0.0)
        zero |= (mask & (value == 0)).to(tl.int32)
    high, middle, low = tl.sum(large, 1), tl.sum(medium, 1), tl.sum(small, 1)
    down = 1 / SCALE
    # The smaller one of neighbours is brought to the scale of the larger one.
    is_high, is_low = high > 0, middle == 0
    value = tl.where(is_low, low, middle + low * down * down)
    value = tl.where(is_high, high + middle * down * down, value)
    k = tl.where(is_high, 1, tl.where(is_low, -1, 0))
    return value, k, tl.max(zero, 1) > 0
