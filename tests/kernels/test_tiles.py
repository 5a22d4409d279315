"""The tiles of the GPU kernels: those of the table, and those of a file of measurements."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pycoherence import cli
from pycoherence.triton_kernels.engine import tiles
from pycoherence.triton_kernels.engine.tiles import Tile, parts_of, seconds_of, tile_for
from pycoherence.triton_kernels.launch.device import Device

H100 = Device(90, 132, "NVIDIA H100")
HALF = (torch.bfloat16, "ieee")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PYCOHERENCE_TILES", str(path))
    for function in (tiles.measured, tile_for):
        function.cache_clear()
    yield path
    for function in (tiles.measured, tile_for):
        function.cache_clear()


def test_measured_tiles_are_taken_for_their_gpu_and_shape(table: Path) -> None:
    found = {"half 1 1024x512": [64, 256, 64, 8, 4]}
    table.write_text(json.dumps({"NVIDIA H100": found}))
    assert tile_for(H100, *HALF, 768, 500, 1) == Tile(64, 256, 64, 8, 4)
    table = Tile(128, 128, 64, 8, 4)
    assert tile_for(H100, *HALF, 768, 500, 0) == Tile(128, 256, 64, 8, 3)
    assert tile_for(H100, *HALF, 1100, 500, 1) == table
    assert tile_for(H100._replace(name="another"), *HALF, 768, 500, 1) == table
    assert tile_for(Device(80, 108), *HALF, 768, 500, 0) == Tile(128, 128, 64, 8, 3)


@pytest.mark.parametrize("text", ["", "[1]", '{"NVIDIA H100": {"half 1 512x512": [1]}}'])
def test_a_file_that_is_none_is_an_error(text: str, table: Path) -> None:
    table.write_text(text)
    with pytest.raises(RuntimeError, match=r"PYCOHERENCE_TILES: expected .* --tune"):
        tile_for(H100, *HALF, 512, 512, 1)


def test_a_missing_file_is_an_error(table: Path) -> None:
    with pytest.raises(RuntimeError, match="PYCOHERENCE_TILES"):
        tile_for(H100, *HALF, 512, 512, 1)


def test_tiles_are_no_larger_than_the_parameter_needs() -> None:
    assert tile_for(H100, *HALF, 10, 40, 1)[:2] == (16, 64)
    assert tile_for(H100, *HALF, 1, 1, 1) == Tile(16, 16, 64, 4, 3)


def test_gpus_of_little_shared_memory_get_smaller_steps() -> None:
    tile = tile_for(Device(89, 128), *HALF, 4096, 4096, 1)
    assert (tile.o + tile.k) * tile.t * 2 * 2 <= 48 * 1024


@pytest.mark.parametrize(("tiles_", "batch"), [(36, 32), (1, 1000), (1024, 32), (130, 7), (1, 1)])
def test_examples_are_divided_so_that_processors_are_busy(tiles_: int, batch: int) -> None:
    parts = parts_of(H100, batch, tiles_, 1000, 1.0, 0)
    assert 1 <= parts <= batch

    def time(n: int) -> int:
        return -(-tiles_ * n // 132) * -(-batch // n)

    assert time(parts) <= time(1)
    if tiles_ == 36:
        assert time(parts) == 9  # 32 * 36 / 132 is 8.7


def test_parts_whose_sums_cost_more_than_they_save_are_not_made() -> None:
    """3072x768 of 8 examples: four parts write and read 75 MB, the time of 250 positions."""
    tile, beside = Tile(128, 128, 64, 8, 3), 3072 * 768 * 4
    assert parts_of(H100, 8, 24 * 6, 8, 1.0, 0) == 4
    assert parts_of(H100, 8, 24 * 6, 8, seconds_of("half", tile, 128), beside) == 1
    assert parts_of(H100, 8, 24 * 6, 8, seconds_of("half", tile, 1024), beside) == 4
    # Few tiles of many examples are divided all the same.
    assert parts_of(H100, 32, 36, 1000, seconds_of("half", tile, 512), 768 * 768 * 4) >= 3


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="bench: torch sees no CUDA device"):
        cli.main(["bench", "--tune", "--out", str(tmp_path / "tiles.json")])
    assert not list(tmp_path.iterdir())


def test_offsets_in_a_large_parameter_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have more than 2^31 numbers where the factors of an example have few."""
    tl = pytest.importorskip("triton.language")
    from pycoherence.triton_kernels.engine import factors

    seen = []
    monkeypatch.setattr(factors, "launch", lambda *_, **given: seen.append(given["OFFSET"]))
    for outputs in (16_000, 16_400):
        x, g = (torch.empty(1, 2, size, device="meta") for size in (2**17, outputs))
        factors.reduce(factors.Factors.of_linear(x, g), frozenset({"weighted_sum"}))
    assert seen == [tl.int32, tl.int64]
