"""Squared norms of gradients of which products of Grams have lost the digits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops._spec import accumulate_dtype
from pycoherence.triton_kernels._device import device_of, launch, precision

# Parts among which the tiles of one example are divided.
_SLOTS = 32


@triton.jit
def _cancelled(
    x,
    g,
    counts,
    sums,
    B,
    T,
    I,
    O,
    slots,
    x_strides,
    g_strides,
    HALVINGS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared norms of the gradients of some examples, in `slots` parts of each.

    The programs share the parts of these examples among them; there may be no examples. A part has
    every tile that is a multiple of `slots` apart. `counts` `[B]` is how many there are up to each
    example, itself included, and `HALVINGS` how often the batch is halved until one is left. `sums`
    `[B, slots]` are written for these examples alone.
    """
    columns = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * columns
    items = tl.load(counts + B - 1).to(tl.int64) * slots
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        low, high = 0, B - 1
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            found = tl.load(counts + middle) > item // slots
            low, high = tl.where(found, low, middle + 1), tl.where(found, middle, high)
            low = min(low, high)
        b = high.to(tl.int64)
        slot = (item % slots).to(tl.int32)
        total = tl.zeros((), ACC)
        for tile in range(slot, tiles, slots):
            o = tile // columns * BLOCK_O + tl.arange(0, BLOCK_O)
            i = tile % columns * BLOCK_I + tl.arange(0, BLOCK_I)
            in_o, in_i = (o < O)[:, None], (i < I)[None, :]
            of_g = g + b * g_strides[0] + o.to(tl.int64)[:, None] * g_strides[2]
            of_x = x + b * x_strides[0] + i.to(tl.int64)[None, :] * x_strides[2]
            grad = tl.zeros((BLOCK_O, BLOCK_I), ACC)
            ones = tl.full((BLOCK_O, BLOCK_I), 1.0, ACC)
            for start in range(0, T, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)
                in_t, t = t < T, t.to(tl.int64)
                left = tl.load(
                    of_g + t[None, :] * g_strides[1], mask=in_o & in_t[None, :], other=0.0
                )
                right = tl.load(
                    of_x + t[:, None] * x_strides[1], mask=in_t[:, None] & in_i, other=0.0
                )
                part = tl.dot(left, right, input_precision=PRECISION, out_dtype=ACC)
                grad = tl.fma(part, ones, grad)
            grad = tl.where(in_o & in_i, grad, 0.0)
            total += tl.sum(grad * grad)
        tl.store(sums + b * slots + slot, total)


def sq_norms_again(x: Tensor, g: Tensor, where: Tensor) -> Tensor:
    """Squared norms by multiplying gradients out, tile by tile, `[B]`.

    Args:
        x: `[B, T, I]`, any strides.
        g: `[B, T, O]`.
        where: `[B]`, for which examples; the results of others mean nothing. What it says never
            leaves the GPU, and if it is nothing, next to nothing is done.
    """
    (batch, positions, i), o, acc = x.shape, g.shape[2], accumulate_dtype(x.dtype)
    side = 32 if acc == torch.float64 else 64
    slots = min(triton.cdiv(i, side) * triton.cdiv(o, side), _SLOTS)
    sums = x.new_empty((batch, slots), dtype=acc)
    launch(
        _cancelled,
        (min(batch * slots, 2 * device_of(x).processors),),
        *(x, g, where.cumsum(0, dtype=torch.int32), sums),
        *(batch, positions, i, o, slots, x.stride(), g.stride()),
        HALVINGS=(batch - 1).bit_length(),
        BLOCK_O=side,
        BLOCK_I=side,
        BLOCK_T=32 if x.dtype.itemsize == 2 else 16,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        PRECISION=precision(x.dtype, exact=True),
        warps=side // 8,
        maxnreg=255,
    )
    return sums.sum(1)
