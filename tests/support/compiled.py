"""The native libraries in build/native, where installing leaves what it compiles.

Nothing is compiled again that did not change since: neither for the gates on CUDA kernels nor for
the wheel. Several processes run tests, so one at a time may look.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/native"
COMPILE = "import glob, setup; setup.compile_library('{kind}', sorted(glob.glob('{sources}')))"
SOURCES = {"cpu": "csrc/cpu/*.cpp", "cuda": "csrc/cuda/*.cu"}


@contextmanager
def locked(folder: Path = BUILD) -> Iterator[None]:
    """Nobody else compiles to the folder or reads from it."""
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_nvcc() -> bool:
    """Whether there is one; in CI there must be."""
    folder = f"{os.environ.get('CUDA_HOME', '')}/bin"
    found = shutil.which("nvcc", path=folder) or shutil.which("nvcc")
    assert found or os.environ.get("CI") != "true", "CI must have nvcc: no CUDA kernel was compiled"
    return found is not None


def environment() -> dict[str, str]:
    """The one of this process, without GPUs that are named."""
    return {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}


def library(kind: str) -> Path:
    """The folder of a library and its objects, as setup.py makes them of the sources here."""
    if kind == "cuda" and not has_nvcc():
        pytest.skip("needs nvcc")
    with locked():
        done = subprocess.run(
            [sys.executable, "-c", COMPILE.format(kind=kind, sources=SOURCES[kind])],
            cwd=ROOT,
            env={**environment(), "PYCOHERENCE_BUILD": kind},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert done.returncode == 0, done.stdout
    return BUILD / kind
