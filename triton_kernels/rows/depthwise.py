"""Gradients of depthwise convolutions, which would leave most of an engine's tile empty."""

from math import prod
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.triton_kernels.engine.factors import Factors, reach
from pycoherence.triton_kernels.engine.kernel import coordinates
from pycoherence.triton_kernels.launch.device import device_of, launch
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two


class DepthwiseTiles(NamedTuple):
    """How the work is divided.

    Attributes:
        taps: Taps of a tile.
        positions: Positions of a tile.
        outputs: Outputs of a tile.
        parts: Among how many programs positions are divided.
    """

    taps: int
    positions: int
    outputs: int
    parts: int


_TILE = 4096
_MOST_TAPS = 64

# Terms of a sum before it is added to another, so that long ones keep their digits.
_TERMS = 512


def depthwise_tiles(factors: Factors) -> DepthwiseTiles:
    """Tiles lie along what is contiguous in `x`; positions are divided to fill the GPU."""
    x, (batch, o, t) = factors.x, factors.g.shape
    k, acc = prod(factors.kernel), accumulate_dtype(x.dtype)
    taps = min(_MOST_TAPS, power_of_two(k))
    left = _TILE // taps // (acc.itemsize // 4)
    t_power, o_power = power_of_two(t), power_of_two(o)
    if x.stride(1) <= x.stride(-1) and o > 1:
        outputs = min(o_power, 32)
        positions = min(t_power, left // outputs)
    else:
        positions = min(t_power, left)
    outputs = min(o_power, left // positions)
    blocks = batch * cdiv(k, taps) * cdiv(o, outputs)
    fill = cdiv(8 * device_of(x).processors, blocks)
    # Beside the parts there is room for their sum.
    room = workspace(x.device) // (batch * o * k * acc.itemsize) - 1
    parts = max(1, min(fill, room, cdiv(t, 4 * positions)))
    return DepthwiseTiles(taps, positions, outputs, parts)


def gradients_in_parts(factors: Factors) -> Tensor:
    """The gradients, `[B, parts, O * K]` in accumulation dtype, to be added up over the parts.

    Factors are read where they lie. Products are never rounded to TensorFloat-32.

    Args:
        factors: Not empty, of one input channel in each group.
    """
    x, g, of = factors.x, factors.g, depthwise_tiles(factors)
    (batch, o, t), taps = g.shape, prod(factors.kernel)
    chunk = of.positions * cdiv(t, of.positions * of.parts)
    parts = cdiv(t, chunk)
    rows = x.new_empty(batch, parts, o * taps, dtype=accumulate_dtype(x.dtype))
    x_batch, x_channel, *x_space = x.stride()
    blocks = cdiv(taps, of.taps) * cdiv(o, of.outputs)
    launch(
        sum_positions,
        (blocks * parts * batch,),
        *(x, g, rows, o, t, parts, chunk),
        *(tuple(x.shape[2:]), factors.out_size),
        *(x_batch, x_channel, tuple(x_space), g.stride()),
        EACH=o // factors.groups,
        KERNEL=factors.kernel,
        STRIDE=factors.stride,
        PADDING=factors.padding,
        DILATION=factors.dilation,
        DIMS=len(factors.kernel),
        TAPS=taps,
        TILE=of[:3],
        BLOCK=_TERMS * of.positions,
        OFFSET=tl.int32 if max(reach(x), reach(g)) < 2**31 else tl.int64,
        warps=4,
    )
    return rows


@triton.jit(do_not_specialize=["parts", "chunk"])
def sum_positions(
    x,
    g,
    rows,
    O,
    T,
    parts,
    chunk,
    size,
    out_size,
    x_batch,
    x_channel,
    x_space,
    g_strides,
    EACH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DIMS: tl.constexpr,
    TAPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """A program sums `chunk` positions, for some taps and some output channels of one example.

    A tile is [taps, positions, outputs]. `x` has a channel for each `EACH` outputs, `x_channel`
    numbers apart, and positions `x_space` apart along each dimension; `g` is [B, O, T] and `rows`
    [B, parts, O, TAPS]. `BLOCK` positions are added up at a time. `OFFSET` is the type of offsets
    within an example.
    """
    ACC: tl.constexpr = rows.dtype.element_ty
    tap_blocks: tl.constexpr = (TAPS + TILE[0] - 1) // TILE[0]
    program = tl.program_id(0)
    part = program // tap_blocks % parts
    block = program // tap_blocks // parts
    blocks = (O + TILE[2] - 1) // TILE[2]
    b = (block // blocks).to(tl.int64)
    tap = program % tap_blocks * TILE[0] + tl.arange(0, TILE[0])
    o = block % blocks * TILE[2] + tl.arange(0, TILE[2])

    taps = coordinates(tap, KERNEL, DIMS)
    x_tap = tl.full((TILE[0],), 0, OFFSET)
    for d in tl.static_range(DIMS):
        x_tap += (taps[d] * DILATION[d] - PADDING[d]).to(OFFSET) * x_space[d]
    x_o = (o // EACH).to(OFFSET) * x_channel
    x_at = x + b * x_batch + (x_tap[:, None, None] + x_o[None, None, :])
    g_at = g + b * g_strides[0] + (o.to(OFFSET) * g_strides[1])[None, None, :]
    in_o = (o < O)[None, None, :]
    in_row = in_o & (tap < TAPS)[:, None, None]

    first = part * chunk
    last = tl.minimum(first + chunk, T)
    whole = tl.full((TILE[0], TILE[2]), 0, ACC)
    for begin in range(first, last, BLOCK):
        acc = tl.full(TILE, 0, ACC)
        for start in range(begin, tl.minimum(begin + BLOCK, last), TILE[1]):
            t = start + tl.arange(0, TILE[1])
            in_t = (t < last)[None, :, None]
            at = coordinates(t, out_size, DIMS)
            x_t = tl.full((TILE[1],), 0, OFFSET)
            seen = in_row & in_t
            for d in tl.static_range(DIMS):
                x_t += (at[d] * STRIDE[d]).to(OFFSET) * x_space[d]
                if PADDING[d] > 0:
                    to_tap = (taps[d] * DILATION[d] - PADDING[d])[:, None, None]
                    i = (at[d] * STRIDE[d])[None, :, None] + to_tap
                    seen &= (i >= 0) & (i < size[d])
            g_t = (t.to(OFFSET) * g_strides[2])[None, :, None]
            grad = tl.load(g_at + g_t, in_o & in_t, 0).to(ACC)
            value = tl.load(x_at + x_t[None, :, None], seen, 0).to(ACC)
            acc += value * grad
        whole += tl.sum(acc, 1)
    at_o = ((b * parts + part) * O + o)[None, :] * TAPS + tap[:, None]
    tl.store(rows + at_o, whole, (o < O)[None, :] & (tap < TAPS)[:, None])
