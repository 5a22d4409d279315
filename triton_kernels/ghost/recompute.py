"""Squared norms of gradients whose digits products of Grams have lost."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.launch.device import device_of, launch, precision
from pycoherence.triton_kernels.launch.finish import Finish
from pycoherence.triton_kernels.launch.host import cdiv

# A sum is trusted if the sizes of its terms add up to no more than this multiple of it.
LIMIT = {torch.float32: 16.0, torch.float64: 2.0**20}

# Parts among which the tiles of one example are divided.
_SLOTS = 32


@triton.jit(do_not_specialize=["B", "halvings"])
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
    halvings,
    x_strides,
    g_strides,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Squared norms of the gradients of some examples, in `slots` parts of each.

    The programs share the parts of these examples among them; there may be no examples. A part has
    every tile that is a multiple of `slots` apart. `counts` `[B]` is how many there are up to each
    example, itself included, and `halvings` how often the batch is halved until one is left. `sums`
    `[slots, B]` are written for these examples alone.
    """
    columns = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * columns
    items = tl.load(counts + B - 1).to(tl.int64) * slots
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        low, high = 0, B - 1
        for _ in range(halvings):
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
        tl.store(sums + (slot.to(tl.int64) * B + b), total)


@triton.jit(do_not_specialize=["B", "pairs"])
def _judge(
    sums,
    sizes,
    counts,
    out,
    B,
    pairs,
    slots,
    limit,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Tell which sums can be trusted; one program adds up their parts, and of absolute values.

    sums, sizes `[B, pairs]`; out `[slots, B]`, the sum and zeros where it is trusted; counts `[B]`,
    how many others there are up to each example, itself included.
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    others = tl.zeros((), tl.int32)
    for first in range(0, B, BLOCK):
        b = first + tl.arange(0, BLOCK)
        inside = b < B
        parts = tl.zeros((BLOCK, PAIRS), ACC)
        large = tl.zeros((BLOCK, PAIRS), ACC)
        for start in range(0, pairs, PAIRS):
            pair = start + tl.arange(0, PAIRS)
            at, there = b.to(tl.int64)[:, None] * pairs + pair, inside[:, None] & (pair < pairs)
            parts += tl.load(sums + at, there, 0)
            large += tl.load(sizes + at, there, 0)
        value, size = tl.sum(parts, 1), tl.sum(large, 1)
        good = (value * limit >= size) & (size < float("inf"))
        bad = (inside & ~good).to(tl.int32)
        tl.store(counts + b, others + tl.cumsum(bad, 0), inside)
        others += tl.sum(bad)
        for slot in range(slots):
            tl.store(out + slot * B + b, tl.where(good & (slot == 0), value, 0), inside)


def trusted_sq_norms(x: Tensor, g: Tensor, sums: Tensor, sizes: Tensor, finish: Finish) -> Tensor:
    """Squared norms `[B]` from sums, or by multiplying gradients out where sums have cancelled.

    Which these are never leaves the GPU, and if there is none, next to nothing is done.

    Args:
        x: `[B, T, I]`, any strides.
        g: `[B, T, O]`.
        sums: `[B, pairs]`, to be added up.
        sizes: The same of absolute values.
        finish: Completes them.
    """
    (batch, positions, i), o, acc = x.shape, g.shape[2], accumulate_dtype(x.dtype)
    side = 32 if acc == torch.float64 else 64
    slots = min(cdiv(i, side) * cdiv(o, side), _SLOTS)
    parts = x.new_empty((slots, batch), dtype=acc)
    counts = x.new_empty(batch, dtype=torch.int32)
    launch(
        _judge,
        (1,),
        *(sums, sizes, counts, parts, batch, sums.shape[1], slots, LIMIT[acc]),
        BLOCK=128,
        PAIRS=16,
    )
    launch(
        _cancelled,
        (min(batch * slots, 2 * device_of(x).processors),),
        *(x, g, counts, parts),
        *(batch, positions, i, o, slots, (batch - 1).bit_length(), x.stride(), g.stride()),
        BLOCK_O=side,
        BLOCK_I=side,
        BLOCK_T=32 if x.dtype.itemsize == 2 else 16,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        PRECISION=precision(x.dtype, exact=True),
        warps=side // 8,
        maxnreg=255,
    )
    return finish.numbers(parts)
