"""affine_reduce on a GPU: sums over positions in one read of `g` and `x`, then over small rows.

A float32 sum is one of sums over up to 512 numbers, so that a million positions do not drift.
"""

from collections.abc import Set
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.launch.device import device_of, launch
from pycoherence.triton_kernels.launch.finish import PARTS, Completed, Finish, SumRequest
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two


@Completed
def affine_reduce(
    g: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    coef: Tensor | None,
    direction: Tensor | None,
    wanted: Set[str],
    request: SumRequest,
    finish: Finish,
) -> tuple[Tensor | None, ...]:
    """The outputs of `affine_reduce`, as its schema says, which `finish` completes.

    Two launches, or one for the shift of a single position; one more for each of `sum_dots`, long
    sums over few channels, and more examples or channels than fit a program; more for `gram`.
    """
    alone = x is None and g.shape[1] == 1
    rows = g if alone else _sums(g, x, mean, rstd)
    return finish.rows(rows, g, coef, direction, wanted, request)


class AffineTiles(NamedTuple):
    """How the work is divided.

    Attributes:
        positions: Positions of a tile.
        channels: Channels of a tile.
        chunk: Positions of a program, a multiple of the tile's.
        parts: Number of programs for all positions, at least one.
    """

    positions: int
    channels: int
    chunk: int
    parts: int


_TILE = 2048


def affine_tiles(g: Tensor) -> AffineTiles:
    """Tiles lie along what is contiguous in memory; positions are divided to fill the GPU."""
    b, t, c = g.shape
    t_power, c_power = power_of_two(max(t, 1)), power_of_two(max(c, 1))
    along_channels = t == 1 or (c > 1 and (g.stride(2) == 1 or g.stride(2) <= g.stride(1)))
    if along_channels:
        channels = min(max(16, c_power), max(128, _TILE // t_power))
        positions = min(t_power, _TILE // channels)
    else:
        positions = min(max(16, t_power), 1024)
        channels = min(c_power, _TILE // positions)
    processors, blocks = device_of(g).processors, max(1, b * cdiv(c, channels))
    wanted = cdiv(8 * processors, blocks)
    if blocks * PARTS >= 2 * processors:
        wanted = min(wanted, PARTS)
    parts = min(wanted, cdiv(t, 4 * positions))
    parts = max(1, parts, cdiv(t, 512 * positions))
    chunk = positions * max(1, cdiv(t, parts * positions))
    return AffineTiles(positions, channels, chunk, max(1, cdiv(t, chunk)))


def _sums(g: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    """Sums over chunks of positions, `[B, parts, C]`."""
    (b, t, c), of = g.shape, affine_tiles(g)
    sums = g.new_empty((b, of.parts, c), dtype=accumulate_dtype(g.dtype))
    factors = (g, x, mean, rstd)
    strides = [None if s is None else s.expand(g.shape).stride() for s in factors]
    furthest = max((t + of.chunk) * s[1] + (c + of.channels) * s[2] for s in strides if s)
    launch(
        _sum_positions,
        (b * of.parts * cdiv(c, of.channels),),
        *(*factors, sums, t, c, of.parts, of.chunk, *strides),
        MEAN=_varies(mean),
        RSTD=_varies(rstd),
        TILE=(of.positions, of.channels),
        INDEX=tl.int32 if furthest < 2**31 else tl.int64,
        warps=8 if g.dtype == torch.float64 else 4,
    )
    return sums


def _varies(s: Tensor | None) -> int:
    """Bit 0: with positions; bit 1: with channels."""
    return 0 if s is None else (s.shape[1] > 1) + 2 * (s.shape[2] > 1)


@triton.jit(do_not_specialize=["parts"])
def _sum_positions(
    g,
    x,
    mean,
    rstd,
    sums,
    T,
    C,
    parts,
    chunk,
    g_strides,
    x_strides,
    mean_strides,
    rstd_strides,
    MEAN: tl.constexpr,
    RSTD: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A program sums `chunk` positions of TILE[1] channels of one example.

    g, x [B, T, C], and mean, rstd that broadcast to it by strides of zero; sums [B, parts, C].
    """
    ACC: tl.constexpr = sums.dtype.element_ty
    block = tl.program_id(0)
    blocks = (C + TILE[1] - 1) // TILE[1]
    c = (block % blocks).to(INDEX) * TILE[1] + tl.arange(0, TILE[1])
    part = block // blocks % parts
    b = (block // blocks // parts).to(tl.int64)
    first = part.to(INDEX) * chunk
    acc = tl.full(TILE, 0, ACC)
    for start in range(first, tl.minimum(first + chunk, T), TILE[0]):
        t = start + tl.arange(0, TILE[0])
        inside = (t < T)[:, None] & (c < C)[None, :]
        value = _load(g, b, t, c, T, C, g_strides, 3).to(ACC)
        if x is not None:
            normal = _load(x, b, t, c, T, C, x_strides, 3).to(ACC)
            if mean is not None:
                normal -= _load(mean, b, t, c, T, C, mean_strides, MEAN).to(ACC)
            if rstd is not None:
                normal *= _load(rstd, b, t, c, T, C, rstd_strides, RSTD).to(ACC)
            # A scale that is not finite times the zeros outside is not zero.
            value = tl.where(inside, value * normal, 0.0)
        acc += value
    to = sums + (b * parts + part) * C + c
    tl.store(to, tl.sum(acc, 0), c < C)


@triton.jit
def _load(s, b, t, c, T, C, strides, VARIES: tl.constexpr):
    """A tile of a factor, zero outside; a row, a column or a number where it is broadcast."""
    s += b * strides[0]
    if VARIES == 3:
        at = s + t[:, None] * strides[1] + c[None, :] * strides[2]
        return tl.load(at, (t < T)[:, None] & (c < C)[None, :], 0)
    elif VARIES == 2:
        return tl.load(s + c * strides[2], c < C, 0)[None, :]
    elif VARIES == 1:
        return tl.load(s + t * strides[1], t < T, 0)[:, None]
    else:
        return tl.load(s)
