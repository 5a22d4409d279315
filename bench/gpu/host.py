"""Counts launches of each layer and the microseconds that the host takes for them.

    python -m bench host [--quick] [--out FILE]

Kernels are compiled for a GPU of Hopper's kind and handed to a CUDA driver that launches nothing
(`tests/support/fake_libcuda.c`), so that this runs where no GPU is. The driver's own time, some 3
microseconds for each launch, is not in the figures. Results are JSON lines.
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.shared import options, results
from bench.shared.environment import ROOT
from bench.shared.results import Row

sys.path.insert(0, str(ROOT / "tests"))
from launchers import gpu, library, load
from triton.runtime.jit import JITFunction

from pycoherence.ops.family.reduce import mask
from pycoherence.triton_kernels.launch.together import together

RUNS = 400
WANT = mask(("sq_norms", "weighted_sum"))


def empty(*shape: int) -> Tensor:
    """A tensor whose memory nobody touches."""
    return torch.empty(shape, dtype=torch.bfloat16)


def op(name: str) -> Any:
    """A Triton op."""
    return getattr(importlib.import_module(f"pycoherence.triton_kernels.{name}"), name)


def linear(b: int, t: int, i: int, o: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of a linear layer with a bias."""
    x, g = empty(b, t, i), empty(b, t, o)
    return [
        (op("linear_reduce"), (x, g, None, None, WANT)),
        (op("affine_reduce"), (g, None, None, None, None, None, WANT)),
    ]


def conv(b: int, side: int, i: int, o: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """Those of a convolution of 3x3 with a bias."""
    x, g = empty(b, side, side, i).permute(0, 3, 1, 2), empty(b, side, side, o).permute(0, 3, 1, 2)
    window = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    return [
        (op("conv_reduce"), (x, g, *window, None, None, WANT)),
        (op("affine_reduce"), (g.flatten(2).mT, None, None, None, None, None, WANT)),
    ]


def norm(b: int, t: int, c: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """Those of a normalisation layer."""
    x, g, of_row = empty(b, t, c), empty(b, t, c), empty(b, t, 1)
    return [
        (op("affine_reduce"), (g, x, of_row, of_row, None, None, WANT)),
        (op("affine_reduce"), (g, None, None, None, None, None, WANT)),
    ]


LAYERS: dict[str, Callable[[], list[tuple[Any, tuple[Any, ...]]]]] = {
    "linear 8x1024, 768 to 768": lambda: linear(8, 1024, 768, 768),
    "linear 8x1024, 768 to 3072": lambda: linear(8, 1024, 768, 3072),
    "linear 32x512, 2048 to 2048": lambda: linear(32, 512, 2048, 2048),
    "linear 128x1, 768 to 768": lambda: linear(128, 1, 768, 768),
    "linear 64x16, 768 to 768": lambda: linear(64, 16, 768, 768),
    "convolution 32x28x28, 128 to 128": lambda: conv(32, 28, 128, 128),
    "layer norm 8x1024, 768": lambda: norm(8, 1024, 768),
}


class _Counter(TorchDispatchMode):
    """Counts torch functions that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name():
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@gpu()
def measure(name: str) -> Row:
    """Launches and time of the host for the squared norms and the gradients of one layer."""
    calls = LAYERS[name]()
    dtypes = [torch.bfloat16] * len(calls)

    def run() -> None:
        together(calls, dtypes, True)

    with kernels() as launched, _Counter() as counter:
        run()
    run()  # records a tape
    times: list[float] = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    median = round(statistics.median(times) * 1e6, 1)
    return {"layer": name, "launches": [*launched, *counter.found], "microseconds": median}


@contextmanager
def kernels() -> Iterator[list[str]]:
    """The names of the kernels that Triton launches for the first time."""
    launch, found = JITFunction.run, list[str]()

    def run(self: Any, *args: Any, **options: Any) -> Any:
        found.append(self.fn.__name__)
        return launch(self, *args, **options)

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = launch


def main(argv: Sequence[str]) -> int:
    given = options.measuring("host", __doc__).parse_args(argv)
    folder = os.environ.get("TRITON_LIBCUDA_PATH")
    if folder is None:
        # The dynamic linker reads its path when a process starts.
        with TemporaryDirectory() as made:
            library(Path(made))
            paths = {"LD_LIBRARY_PATH": made, "TRITON_LIBCUDA_PATH": made}
            # Memory of a GPU is kept for the next tensor too, not given back.
            paths |= {
                "MALLOC_MMAP_THRESHOLD_": "33554432",
                "MALLOC_TRIM_THRESHOLD_": "1" + "0" * 11,
            }
            command = [sys.executable, "-m", "bench", "host", *argv]
            return subprocess.run(command, env=os.environ | paths, check=False).returncode
    load(Path(folder))
    names = list(LAYERS)[: 1 if given.quick else None]
    with torch.no_grad():
        for row in results.written(map(measure, names), given.out):
            print(
                f"{row['layer']:34}{len(row['launches']):3} launches "
                f"{row['microseconds']:7.1f} us  ",
                *row["launches"],
            )
    return 0
