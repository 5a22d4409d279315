"""Which tiles of the engine are fastest on the GPU at hand: what `bench --tune` does."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pycoherence.triton_kernels.engine.factors import Factors, reduce, tile_of
from pycoherence.triton_kernels.engine.tiles import Tile, shape_class

# Factors, as B examples of T positions; the tiles found serve any batch.
_BATCH, _POSITIONS = 16, 512
_SIZES = (256, 768, 1024, 2048, 4096)
_KINDS = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
_WANTED = {
    0: ("sq_norms",),
    1: ("sq_norms", "weighted_sum"),
    2: ("sq_norms", "weighted_sum", "second_moment"),
}
_REPEATS = 5


def tune(out: Path) -> None:
    """Measure candidates on square layers and write the best of each; takes minutes.

    Each is compared with the tile of the built-in table first, and left out if it gives something
    else or does not fit the GPU. Measurements for other GPUs that the file holds are kept.

    Args:
        out: The file, which `PYCOHERENCE_TILES` is then to name.

    Raises:
        RuntimeError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device, which tiles are measured on")
    compile_all()
    known = json.loads(out.read_text()) if out.exists() else {}
    here = known.setdefault(torch.cuda.get_device_name(), {})
    for shape, tile, seconds in _best_of_each():
        here[shape] = tile
        print(f"{shape:<24} {tile!s:<24} {seconds * 1e3:8.3f} ms", flush=True)
        out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"written to {out}; set PYCOHERENCE_TILES={out} to use it")


def compile_all() -> None:
    """Compile all candidates on all cores; one after the other they take longer than the rest.

    Compiled kernels serve all sizes, and other processes through Triton's folder of compiled code.
    """
    jobs = [(kind, beside, tile) for kind in _KINDS for beside in _WANTED for tile in _of(kind)]
    processes = min(16, os.cpu_count() or 1)  # each takes half a GB of the GPU
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_compile, *job) for job in jobs]):
            done.result()


def _compile(kind: str, beside: int, tile: Tile) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    x = torch.zeros(1, _POSITIONS, _SIZES[0], device="cuda", dtype=_KINDS[kind])
    with suppress(OutOfResources):
        reduce(Factors.of_linear(x, x), frozenset(_WANTED[beside]), tile=tile)


def _of(kind: str) -> list[Tile]:
    return [Tile(*one) for one in _candidates(kind)]


def _best_of_each() -> Iterator[tuple[str, list[int], float]]:
    policy = torch.backends.cuda.matmul.fp32_precision
    try:
        for kind, dtype in _KINDS.items():
            torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
            for size in _SIZES:
                x, g = (
                    torch.randn(_BATCH, _POSITIONS, size, device="cuda", dtype=dtype)
                    for _ in range(2)
                )
                for beside, wanted in _WANTED.items():
                    factors = Factors.of_linear(x, g)
                    times = _times(factors, frozenset(wanted), kind)
                    tile = min(times, key=lambda one: times[one])
                    shapes = shape_class(kind, size, size, beside, factors.described)
                    yield shapes, list(tile), times[tile]
    finally:
        torch.backends.cuda.matmul.fp32_precision = policy


def _times(factors: Factors, wanted: frozenset[str], kind: str) -> dict[tuple[int, ...], float]:
    """Seconds of each candidate that is right."""
    first = tile_of(factors, wanted)
    truth = _added(reduce(factors, wanted, tile=first))
    times = {}
    for tile in {first, *_of(kind)}:
        try:
            found = _added(reduce(factors, wanted, tile=tile))
        except OutOfResources:
            continue
        if all(_close(found[name], truth[name]) for name in wanted):
            times[tile] = _seconds(partial(reduce, factors, wanted, tile=tile))
    return times


def _candidates(kind: str) -> Iterable[tuple[int, ...]]:
    if kind == "float32":
        return [(o, k, t, w, 2) for o, k in _pairs(32, 128) for t in (16, 32) for w in (4, 8)]
    steps = (32, 64) if kind == "half" else (16, 32)
    found = [(o, k, t, 8, s) for o, k in _pairs(64, 256) for t in steps for s in (2, 3, 4)]
    return [*found, *((128, 256, 64, 16, s) for s in (2, 3, 4) if kind == "half")]


def _pairs(low: int, high: int) -> list[tuple[int, int]]:
    sizes = [size for size in (32, 64, 128, 256) if low <= size <= high]
    return [(o, k) for o in sizes for k in sizes if o * k <= 128 * 256]


def _added(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.sum(0) for name, each in outputs.items()}


def _close(found: Tensor, truth: Tensor) -> bool:
    return bool((found - truth).abs().max() <= 1e-4 * truth.abs().max())


def _seconds(run: Callable[[], object]) -> float:
    """Median of a few runs, by the clock of the GPU."""
    run()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[_REPEATS // 2]
