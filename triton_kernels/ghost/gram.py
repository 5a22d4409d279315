"""Gram matrices of gradients as products of two Grams of their factors, which make no gradient."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.ghost.gram_kernels import merge, multiply, partial
from pycoherence.triton_kernels.ghost.norms import (
    block_for,
    depth_for,
    exact_kind,
    ghost_sq_norms,
    largest_tile,
)
from pycoherence.triton_kernels.ghost.recompute import LIMIT
from pycoherence.triton_kernels.launch.device import Device, device_of, launch, precision
from pycoherence.triton_kernels.launch.finish import finished
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two


class _Grid(NamedTuple):
    """How the positions of two batches become rows and columns of tiles.

    Attributes:
        rows: Rows of a tile, and its columns.
        positions: Padded number of positions of a group, for both batches.
        splits: Groups of an example.
        groups: Groups of a batch.
        tiles: In a column of the matrix, and in a row.
        same: Whether it is symmetric, so that pairs of tiles are enough.
    """

    rows: int
    positions: tuple[int, int]
    splits: tuple[int, int]
    groups: tuple[int, int]
    tiles: tuple[int, int]
    same: bool

    @classmethod
    def of(cls, rows: int, shapes: list[tuple[int, int]], same: bool) -> "_Grid":
        """From examples and positions of both batches."""
        positions = tuple(min(rows, power_of_two(t)) for _, t in shapes)
        splits = tuple(cdiv(t, p) for (_, t), p in zip(shapes, positions, strict=True))
        groups = tuple(b * n for (b, _), n in zip(shapes, splits, strict=True))
        tiles = tuple(cdiv(n * p, rows) for n, p in zip(groups, positions, strict=True))
        return cls(rows, positions, splits, groups, tiles, same)

    @property
    def programs(self) -> int:
        """How many tiles are computed."""
        one, two = self.tiles
        return one * (one + 1) // 2 if self.same else one * two

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that the kernels are compiled for."""
        return {
            "P1": self.positions[0],
            "P2": self.positions[1],
            "ROWS": self.rows,
            "SAME": self.same,
        }


def gram_of_products(
    x1: Tensor, g1: Tensor, x2: Tensor | None = None, g2: Tensor | None = None
) -> Tensor:
    """Dot products `sum_ts <x1_bt, x2_cs> <g1_bt, g2_cs>` of gradients without the gradients.

    With several positions terms may cancel, and rounding is left. Elements whose terms add up to
    more than 16 times the product of the two norms, without their signs, are computed again in
    float64, and so is what is not finite; which these are never leaves the GPU. The others are off
    by up to 16 times the rounding of float32 sums, some 1e-5, of the product of the norms.

    Args:
        x1: `[B1, T1, I]`, not empty, any strides.
        g1: `[B1, T1, O]`.
        x2: `[B2, T2, I]`; the first batch if `None`, for a result that is exactly symmetric.
        g2: `[B2, T2, O]`.

    Returns:
        `[B1, B2]`, in accumulation dtype.
    """
    factors = (x1, g1, x1, g1) if x2 is None or g2 is None else (x1, g1, x2, g2)
    same, acc = x2 is None, accumulate_dtype(x1.dtype)
    single = x1.shape[1] == factors[2].shape[1] == 1
    value, sizes = _products(factors, same, not single and acc == torch.float32)
    if acc == torch.float64:
        return value
    if sizes is None:
        return _repeated(factors, same, value, value, torch.finfo(acc).max)
    if same:
        one = two = value.diagonal()
    else:
        one, two = (finished(ghost_sq_norms, *each) for each in (factors[:2], factors[2:]))
    scale = one.clamp(min=0).sqrt()[:, None] * two.clamp(min=0).sqrt()
    doubt = sizes / scale.clamp(min=torch.finfo(acc).tiny)
    return _repeated(factors, same, value, doubt, LIMIT[acc])


_Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def _products(factors: _Factors, same: bool, sized: bool) -> tuple[Tensor, Tensor | None]:
    """The sums, and if they are to be `sized`, those of absolute values."""
    x1, g1, x2, g2 = factors
    device, acc = device_of(x1), accumulate_dtype(x1.dtype)
    grid = _grid_for(device, factors, same)
    block = block_for(x1.dtype, grid.rows, device.capability)
    value = x1.new_empty(grid.groups, dtype=acc)
    sizes = torch.empty_like(value) if sized else None
    ends = len(x1), len(x2), x1.shape[1], x2.shape[1], *grid.splits
    how = {
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "PRECISION": precision(x1.dtype, exact=True),
        "warps": block.warps,
        "stages": block.stages,
        "maxnreg": block.registers,
    }
    depths = {"DEPTH_X": depth_for(block, x1, x2), "DEPTH_G": depth_for(block, g1, g2)}
    parts = _parts_for(device, x1.dtype, grid, x1.shape[2] + g1.shape[2], block.depth)
    if parts == 1:
        launch(
            multiply,
            (grid.programs,),
            *(*factors, value, sizes, None, *ends, x1.shape[2], g1.shape[2], grid.tiles[1]),
            *(*(factor.stride() for factor in factors), 0.0),
            **grid.constants,
            **depths,
            **how,
        )
    else:
        sums = [
            _dots(a, b, grid, parts, ends, how | {"DEPTH": depth})
            for a, b, depth in zip((x1, g1), (x2, g2), depths.values(), strict=True)
        ]
        launch(
            merge,
            (grid.programs,),
            *(*sums, value, sizes, *ends, grid.tiles[1]),
            **grid.constants,
            warps=8,
            maxnreg=255,
        )
    return _joined(value, grid), None if sizes is None else _joined(sizes, grid)


def _dots(
    a: Tensor, b: Tensor, grid: _Grid, parts: int, ends: tuple[int, ...], how: dict[str, Any]
) -> Tensor:
    """Tiles of dot products of the rows of one factor, `[tiles, rows, rows]`."""
    size, depth = a.shape[2], how["DEPTH"]
    span = cdiv(cdiv(size, parts), depth) * depth
    acc = accumulate_dtype(a.dtype)
    spans = cdiv(size, span)
    out = a.new_empty((spans, grid.programs, grid.rows, grid.rows), dtype=acc)
    launch(
        partial,
        (grid.programs, spans),
        *(a, b, out, *ends, size, span, grid.tiles[1], a.stride(), b.stride()),
        **grid.constants,
        **how,
    )
    return out.sum(0)


def _repeated(factors: _Factors, same: bool, value: Tensor, doubt: Tensor, limit: float) -> Tensor:
    """`value`, in float64 where `doubt` is above `limit` or NaN."""
    x1, g1, x2, _ = factors
    shapes = [(len(x), x.shape[1]) for x in (x1, x2)]
    grid, block = _Grid.of(64, shapes, same), block_for(torch.float64, 64, 90)
    whole = grid.splits == (1, 1)
    out = value if whole else value.new_empty(grid.groups, dtype=torch.float64)
    launch(
        multiply,
        (grid.programs,),
        *(*factors, out, None, doubt, len(x1), len(x2), x1.shape[1], x2.shape[1], *grid.splits),
        *(x1.shape[2], g1.shape[2], grid.tiles[1]),
        *(*(factor.stride() for factor in factors), limit),
        **grid.constants,
        DEPTH_X=block.depth,
        DEPTH_G=block.depth,
        ACC=tl.float64,
        PRECISION="ieee",
        warps=block.warps,
        stages=block.stages,
        maxnreg=block.registers,
    )
    if whole:
        return out
    return torch.where(doubt.abs() <= limit, value, _joined(out, grid).to(value.dtype))


def _joined(groups: Tensor, grid: _Grid) -> Tensor:
    """Sums over the groups of each example."""
    if grid.splits == (1, 1):
        return groups
    one, two = grid.splits
    out = groups.view(len(groups) // one, one, groups.shape[1] // two, two).sum((1, 3))
    return out.triu() + out.triu(1).mT if grid.same else out


def _grid_for(device: Device, factors: _Factors, same: bool) -> _Grid:
    """Large tiles if there are enough for half of the processors, else smaller ones."""
    shapes = [(len(x), x.shape[1]) for x in factors[::2]]
    most = max(b * power_of_two(t) for b, t in shapes)
    rows = min(max(16, power_of_two(most)), largest_tile(factors[0].dtype))
    grid = _Grid.of(rows, shapes, same)
    while rows > 64 and grid.programs < device.processors / 2:
        rows //= 2
        grid = _Grid.of(rows, shapes, same)
    return grid


# Multiply-adds per microsecond of a whole GPU, and numbers that it stores and reads again; of an
# H100, but only their ratio is of interest, which GPUs have in common.
_RATE = {"half": 2e8, "tf32x3": 6e7, "float32": 2e7, "float64": 2e7}
_STORED = 5e5
_LAUNCHES = 10.0


def _parts_for(device: Device, dtype: torch.dtype, grid: _Grid, features: int, depth: int) -> int:
    """Among how many programs the features of each factor are divided, for tiles are few.

    The time, in microseconds, is that of the programs which a processor runs one after the other,
    and with parts that of more launches and of storing all dot products.
    """
    numbers = grid.rows**2 * grid.programs
    alone = grid.rows**2 * features * device.processors / _RATE[exact_kind(dtype)]

    def time(parts: int) -> float:
        if parts == 1:
            return cdiv(grid.programs, device.processors) * alone
        waves = cdiv(2 * parts * grid.programs, device.processors)
        return waves * alone / (2 * parts) + _LAUNCHES + 2 * parts * numbers / _STORED

    most = max(1, features // (8 * depth))
    return min((2**n for n in range(7) if 2**n <= most), key=time)
