"""Native kernels as compiled for lesser machines, which torch's own setting asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.backends import backends_of

pytestmark = pytest.mark.skipif(
    "native" not in backends_of("linear_reduce"), reason="the native kernels are not built"
)

# Samples and large shapes of every native op, against the reference in float64.
TESTS = [
    "test_backends.py::test_agrees_with_the_reference_in_float64",
    "test_native.py::test_large_and_uneven_shapes",
    "test_native_gram.py::test_large_and_uneven_shapes",
]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_agrees_with_the_reference_in_float64(level: str) -> None:
    """The setting is read once, so each level is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not reference- and not f16", *TESTS],
        cwd=Path(__file__).parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
