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

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/native"
COMPILE = "import glob, setup; setup.compile_library('cuda', sorted(glob.glob('csrc/cuda/*.cu')))"


@contextmanager
def locked() -> Iterator[None]:
    """Nobody else compiles or reads."""
    BUILD.parent.mkdir(exist_ok=True)
    with open(BUILD.parent / "native.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def require_nvcc() -> None:
    """Skips where there is none, except in CI."""
    folder = f"{os.environ.get('CUDA_HOME', '')}/bin"
    if not (shutil.which("nvcc", path=folder) or shutil.which("nvcc")):
        assert os.environ.get("CI") != "true", "CI must have nvcc: no CUDA kernel was compiled"
        pytest.skip("needs nvcc")


def cuda() -> Path:
    """The folder of _C_cuda and its objects, as setup.py makes them of the sources here."""
    require_nvcc()
    with locked():
        done = subprocess.run(
            [sys.executable, "-c", COMPILE],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert done.returncode == 0, done.stdout
    return BUILD / "cuda"
