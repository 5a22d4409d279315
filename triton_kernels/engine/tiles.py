"""How large the tiles of the engine are, and among how many programs the batch is divided."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from pycoherence.triton_kernels.launch.device import Device
from pycoherence.triton_kernels.launch.host import cdiv, power_of_two

LONG = 1024
"""Positions that the accumulator of a product may add up before its rounding shows."""


class Tile(NamedTuple):
    """The work of one program of the engine.

    Attributes:
        o: Outputs.
        k: Columns: inputs, times the taps of a convolution.
        t: Positions in one step.
        warps: Warps of the program.
        stages: Stages of the software pipeline.
    """

    o: int
    k: int
    t: int
    warps: int
    stages: int

    @property
    def wide(self) -> bool:
        """Whether it is larger than 128x128."""
        return self.o * self.k > 128 * 128


# By what is multiplied, and by how many tiles are kept beside the product: 0, 1, 2, more.
# No row spills for want of registers on sm_80, sm_90 and sm_100.
_TABLE = {
    "half": ((128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 8, 3)),
    "tf32": ((128, 128, 32, 8, 3), (128, 128, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 8, 3)),
    "float32": ((64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
    "float64": ((64, 64, 16, 8, 2), (32, 64, 16, 8, 2), (32, 64, 16, 8, 2), (32, 64, 16, 8, 2)),
}


# In half precision, on GPUs with the shared memory of Hopper. Tiles of 128x128 read 64 bytes for
# 4096 multiply-adds, which the L2 cache of an H200 cannot keep up with (predicted, not measured):
# where nothing is kept beside the product, registers hold one that is twice as wide.
_HOPPER = {0: (128, 256, 64, 8, 3), 1: (128, 128, 64, 8, 4)}

# The same where the GPU copies factors by descriptors, which take no registers: those of 16 warps
# hold a tile of 128x256 and one beside it, save a few numbers at the end of an example, if the
# parameter is made of whole tiles; those of 8 warps a tile of 128x128 and two.
_DESCRIBED = {0: (128, 256, 64, 8, 4), 1: (128, 256, 64, 16, 3), 2: (128, 128, 64, 8, 3)}


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The row of the tables for what is multiplied."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "float32"
    return "float64" if dtype == torch.float64 else "half"


def shape_class(kind: str, o: int, k: int, beside: int, described: bool) -> str:
    """The name of the shapes that a measured tile is for: sizes up to the next power of two."""
    how = f"{kind} by descriptors" if described else kind
    return f"{how} {min(beside, 3)} {power_of_two(o)}x{power_of_two(k)}"


@functools.cache
def measured(gpu: str) -> dict[str, Tile]:
    """The tiles that `python -m pycoherence bench --tune` found best on a GPU of this name.

    They are read from the file that the environment variable `PYCOHERENCE_TILES` names, once.
    """
    path = os.environ.get("PYCOHERENCE_TILES")
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
        return {shape: Tile(*tile) for shape, tile in found.get(gpu, {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RuntimeError(
            f"PYCOHERENCE_TILES: expected {path} to be a file that `python -m pycoherence bench "
            f"--tune` wrote, got {error!r}; write it again or unset the variable"
        ) from error


@functools.lru_cache(maxsize=4096)
def tile_for(
    device: Device,
    dtype: torch.dtype,
    precision: str,
    o: int,
    k: int,
    beside: int,
    described: bool = False,
) -> Tile:
    """The tile for a parameter of `[o, k]`.

    Args:
        device: The GPU.
        dtype: Dtype of the factors.
        precision: Result of `precision`.
        o: Outputs in a group.
        k: Columns in a group.
        beside: How many tiles are kept beside the product.
        described: Whether the GPU copies the factors by descriptors.
    """
    kind = kind_of(dtype, precision)
    tile = measured(device.name).get(shape_class(kind, o, k, beside, described))
    if tile is not None:
        return tile
    if kind == "tf32" and beside and device.capability < 90:
        beside += 1  # before Hopper the factors take registers too
    tile = Tile(*_TABLE[kind][min(beside, 3)])
    if kind == "half" and device.capability >= 90 and device.roomy and min(o, k) > 128:
        tile = Tile(*_HOPPER.get(beside, tile))
        wide = Tile(*_DESCRIBED.get(beside, tile))
        if described and (wide.warps == 8 or o % wide.o == k % wide.k == 0):
            tile = wide
    if not device.roomy:
        tile = tile._replace(t=min(tile.t, 32))
    small_o, small_k = _fit(tile.o, o), _fit(tile.k, k)
    warps = tile.warps * small_o * small_k // (tile.o * tile.k)
    return tile._replace(o=small_o, k=small_k, warps=min(tile.warps, max(warps, 4)))


def _fit(block: int, size: int) -> int:
    """The block, or a smaller power of two that holds the size; a product needs 16."""
    return min(block, max(16, power_of_two(size)))


# Multiplications and additions of a processor in a second at three quarters of its peak, and bytes
# of the memory in a second, of Hopper. Only their ratio matters.
_RATE = {"half": 5.5e12, "tf32": 2.8e12, "float32": 0.4e12, "float64": 0.4e12}
_BYTES = 4e12


def seconds_of(kind: str, tile: Tile, positions: int) -> float:
    """The time that a processor takes for the positions of a tile."""
    return 2.0 * tile.o * tile.k * positions / _RATE[kind]


@functools.lru_cache(maxsize=4096)
def parts_of(device: Device, batch: int, tiles: int, most: int, each: float, sum_bytes: int) -> int:
    """Among how many programs the examples of a tile are divided.

    The time is that of the programs which a processor runs one after the other, times the examples
    of each, and that of writing and reading the sums of each part if there are several.

    Args:
        device: The GPU.
        batch: Number of examples.
        tiles: Number of tiles.
        most: The most parts there is room for.
        each: Seconds of an example of one tile.
        sum_bytes: Bytes of the sums of one part.
    """

    def time(parts: int) -> float:
        rounds = cdiv(tiles * parts, device.processors) * cdiv(batch, parts)
        return rounds * each + (2 * parts * sum_bytes / _BYTES if parts > 1 else 0.0)

    enough = cdiv(4 * device.processors, tiles)
    return min(range(1, max(1, min(batch, most, enough)) + 1), key=time)
