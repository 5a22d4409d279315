"""Squared norms from two Grams of positions, and what all kernels of that kind share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.ghost.recompute import trusted_sq_norms
from pycoherence.triton_kernels.launch.device import Device, device_of, launch, precision
from pycoherence.triton_kernels.launch.finish import Finish
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two


class Block(NamedTuple):
    """The work of one step of a ghost kernel, and how it runs.

    Attributes:
        depth: Features of one step.
        warps: Warps of the program.
        registers: The most that a thread may have; left alone, the compiler rather spills some for
            the sake of more programs at a time.
        stages: Stages of the software pipeline.
    """

    depth: int
    warps: int
    registers: int = 255
    stages: int = 3


# By what is multiplied; 128 rows on a side, 64, and fewer. Nothing spills on sm_80, 90 and 100.
_BLOCKS = {
    "half": {128: Block(64, 8), 64: Block(64, 4, 168), 0: Block(64, 4)},
    "tf32x3": {64: Block(16, 4), 0: Block(16, 4)},
    "float32": {64: Block(16, 8), 0: Block(16, 4)},
    "float64": {64: Block(16, 8), 0: Block(16, 4)},
}


def exact_kind(dtype: torch.dtype) -> str:
    """By what the products of exact sums are taken: a row of the table of blocks."""
    if dtype.itemsize == 2:
        return "half"
    if dtype == torch.float64:
        return "float64"
    return "tf32x3" if precision(dtype, exact=True) == "tf32x3" else "float32"


def block_for(dtype: torch.dtype, rows: int, capability: int) -> Block:
    """The block of a tile of `rows` by `rows` dot products."""
    sizes = _BLOCKS[exact_kind(dtype)]
    block = sizes.get(rows) or sizes[0]
    # Others than these multiply operands that are in registers.
    return block if rows < 128 or capability in (90, 100, 103) else block._replace(depth=32)


def depth_for(block: Block, *factors: Tensor) -> int:
    """The depth of a block, less if loads are not of 16 bytes and each takes registers."""

    def wide(x: Tensor) -> bool:
        return x.stride(2) == 1 and not any(n % 16 for n in (*x.stride()[:2], x.shape[2]))

    return block.depth if all(map(wide, factors)) else 16


def largest_tile(dtype: torch.dtype) -> int:
    """The most rows on a side of a tile."""
    return max(_BLOCKS[exact_kind(dtype)])


@triton.jit
def dots(
    left,
    right,
    left_in,
    right_in,
    left_step,
    right_step,
    first,
    last,
    size,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products of rows with rows over the features `first` to `last`, `[ROWS, ROWS]`.

    Each step's products are added up by themselves: a tensor core cuts off what does not fit, which
    shows in long sums. `tl.fma` is an addition that the compiler leaves outside of the product.

    `left` and `right` point to the first feature of each row, `left_in` and `right_in` tell which
    rows there are; features lie `left_step` and `right_step` apart, and there are `size`. `first`
    is a multiple of `DEPTH`. If `ONE`, both sides are the same rows and read once.
    """
    total = tl.zeros((ROWS, ROWS), ACC)
    ones = tl.full((ROWS, ROWS), 1.0, ACC)
    for start in range(first, last, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (k < size)[None, :]
        k = k.to(tl.int64)[None, :]
        a = tl.load(left[:, None] + k * left_step, mask=left_in[:, None] & inside, other=0.0)
        if ONE:
            b = a
        else:
            b = tl.load(right[:, None] + k * right_step, mask=right_in[:, None] & inside, other=0.0)
        part = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
        total = tl.fma(part, ones, total)
    return total


@triton.jit
def pair_of(index, tiles):
    """The `index`-th unordered pair of tiles: `tiles * (tiles + 1) / 2` of them, in diagonals."""
    row = index % tiles
    return row, (row + index // tiles) % tiles


@triton.jit
def _ghost(
    x,
    g,
    sums,
    sizes,
    T,
    I,
    O,
    tiles,
    x_strides,
    g_strides,
    ROWS: tl.constexpr,
    DEPTH_X: tl.constexpr,
    DEPTH_G: tl.constexpr,
    ONE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of dot products of two blocks of positions of one example, added up.

    Grid: examples times unordered pairs of blocks, the pairs of an example side by side; there is
    but `ONE` block, or `tiles`. Different blocks count twice. `sums` are `[B, pairs]`, and so are
    `sizes`, of absolute values.
    """
    pairs = tiles * (tiles + 1) // 2
    b = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = pair_of(tl.program_id(0) % pairs, tiles)
    t, s = i * ROWS + tl.arange(0, ROWS), j * ROWS + tl.arange(0, ROWS)
    in_t, in_s = t < T, s < T
    x += b * x_strides[0]
    g += b * g_strides[0]
    x_t, x_s = x + t.to(tl.int64) * x_strides[1], x + s.to(tl.int64) * x_strides[1]
    g_t, g_s = g + t.to(tl.int64) * g_strides[1], g + s.to(tl.int64) * g_strides[1]
    step = x_strides[2]
    of_x = dots(x_t, x_s, in_t, in_s, step, step, 0, I, I, ROWS, DEPTH_X, ONE, ACC, PRECISION)
    step = g_strides[2]
    of_g = dots(g_t, g_s, in_t, in_s, step, step, 0, O, O, ROWS, DEPTH_G, ONE, ACC, PRECISION)
    # Rows that are not there are zeros, which Inf turns into NaN.
    product = tl.where(in_t[:, None] & in_s[None, :], of_x * of_g, 0.0)
    weight = tl.where(i == j, 1.0, 2.0).to(ACC)
    tl.store(sums + tl.program_id(0), weight * tl.sum(product))
    tl.store(sizes + tl.program_id(0), weight * tl.sum(tl.abs(product)))


def ghost_sq_norms(x: Tensor, g: Tensor, finish: Finish) -> Tensor:
    """Squared norms of gradients without the gradients.

    They are `sum_ts <x_t, x_s> <g_t, g_s>`. If its terms cancel, rounding is all that would be
    left; such an example's gradient is multiplied out after all, tile by tile, and so is one whose
    products are not finite. Which examples these are never leaves the GPU.

    Args:
        x: `[B, T, I]`, any strides.
        g: `[B, T, O]`.
        finish: Completes them.

    Returns:
        `[B]`, in accumulation dtype.
    """
    batch, positions, i = x.shape
    o, acc = g.shape[2], accumulate_dtype(x.dtype)
    if not x.numel() or not g.numel():
        return x.new_zeros(batch, dtype=acc)
    device = device_of(x)
    rows = _rows_for(device, x.dtype, batch, positions)
    block, tiles = block_for(x.dtype, rows, device.capability), cdiv(positions, rows)
    pairs = tiles * (tiles + 1) // 2
    sums, sizes = (x.new_empty((batch, pairs), dtype=acc) for _ in range(2))
    how = {
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "PRECISION": precision(x.dtype, exact=True),
    }
    launch(
        _ghost,
        (batch * pairs,),
        *(x, g, sums, sizes, positions, i, o, tiles, x.stride(), g.stride()),
        ROWS=rows,
        DEPTH_X=depth_for(block, x),
        DEPTH_G=depth_for(block, g),
        ONE=tiles == 1,
        warps=block.warps,
        stages=block.stages,
        maxnreg=block.registers,
        **how,
    )
    return trusted_sq_norms(x, g, sums, sizes, finish)


def _rows_for(device: Device, dtype: torch.dtype, batch: int, positions: int) -> int:
    """Positions of a block: the most that fit and leave programs enough for the GPU."""
    rows = min(max(16, power_of_two(positions)), largest_tile(dtype))
    while rows > 32 and batch * cdiv(positions, rows) ** 2 < device.processors / 2:
        rows //= 2
    return rows
