"""The time that a GPU should take, from the instructions of compiled kernels and from bytes.

The constants are of sm_90 and an H200: what its processors do in a cycle, and how many instructions
a warp of the compiled tile engine has for a step and for the end of an example (`tests/aot.py`
compiles it; `cuobjdump -sass` shows them). They are predictions, to be set beside measurements.
"""

from math import ceil

import torch
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.engine.cost import from_engine
from pycoherence.triton_kernels.engine.factors import Factors, tile_of
from pycoherence.triton_kernels.engine.tiles import kind_of, parts_of, seconds_of
from pycoherence.triton_kernels.launch.device import HOPPER, precision

CLOCK = 1.755e9
BYTES = 4.8e12
FLOPS = {"half": 4096.0, "tf32": 2048.0, "float32": 256.0, "float64": 256.0}
"""Additions and multiplications of a processor in a cycle, each counted."""

CACHED = 9e12 / (132 * CLOCK)
"""Bytes that the L2 cache gives a processor in a cycle: the least sure of all constants here."""

ISSUED = 4
"""Instructions of warps that a processor starts in a cycle."""

STEP, STEP_DESCRIBED, END = 129, 107, 140
"""Instructions of a warp for a step of the engine, for one whose factors the GPU copies by
descriptors, and for each operation at an example's end."""

BUSY = 0.8
"""Share of the time for which loads that run ahead keep the tensor cores at work."""

LAUNCH = 3e-6
"""Seconds between kernels that follow each other."""


def linear_reduce(x: Tensor, g: Tensor, wanted: frozenset[str]) -> float | None:
    """Seconds of `linear_reduce` in the tile engine; `None` if another way is chosen."""
    (b, t, i), o = x.shape, g.shape[2]
    how = precision(x.dtype)
    kind = kind_of(x.dtype, how)
    sums = len(wanted & {"weighted_sum", "second_moment", "sign_sum"})
    factors = Factors.of_linear(x, g)
    tile, described = tile_of(factors, wanted), factors.described
    if from_engine(b, t, i, o, kind, wanted, False, tile.wide) != wanted:
        return None
    tiles = ceil(o / tile.o) * ceil(i / tile.k)
    beside = o * i * accumulate_dtype(x.dtype).itemsize * sums
    each = seconds_of(kind, tile, t)
    parts = parts_of(HOPPER, b, tiles, 65535, each, beside)
    multiply = 2.0 * tile.o * tile.k * tile.t / FLOPS[kind]
    issue = (STEP_DESCRIBED if described else STEP) * tile.warps / ISSUED
    read = (tile.o + tile.k) * tile.t * x.itemsize / CACHED
    end = END * len(wanted) * tile.warps / ISSUED
    example = ceil(t / tile.t) * max(multiply / BUSY, issue, read) + end
    rounds = ceil(tiles * parts / HOPPER.processors) * ceil(b / parts)
    moved = (x.nbytes + g.nbytes + beside * (2 * parts + 1 if parts > 1 else 1)) / BYTES
    return max(rounds * example / CLOCK, moved) + LAUNCH * 2


def by_bytes(count: float) -> float:
    """Seconds of a kernel that waits for nothing but the memory, at four fifths of its speed."""
    return count / (0.8 * BYTES) + LAUNCH


def by_extremes(count: float) -> float:
    """Seconds of a kernel that takes minima and maxima, one for each lane in two cycles."""
    return count / (64 * HOPPER.processors * CLOCK) + LAUNCH


def of_products(flops: float, dtype: torch.dtype) -> float:
    """Seconds of a product of large matrices, at three quarters of the peak."""
    kind = kind_of(dtype, precision(dtype))
    return flops / (0.75 * FLOPS[kind] * HOPPER.processors * CLOCK) + LAUNCH
