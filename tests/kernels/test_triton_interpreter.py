"""Tests of Triton kernels in its interpreter, in two processes of their own.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/triton/test_NAME.py`. bfloat16 is left out, since
the interpreter computes it wrongly.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "tests/kernels/triton").glob("test_*.py"))

# Tests of all backends, of which the interpreter runs those of Triton.
SHARED = [ROOT / f"tests/unit/ops/test_{name}.py" for name in ("backends", "views", "not_finite")]

# It is numpy that multiplies there, and it warns of what is not finite; of Triton 3.6 itself, too.
QUIET = [
    *("-W", "ignore::RuntimeWarning"),
    *("-W", "ignore:Conversion of an array:DeprecationWarning"),
]

# The interpreter is repeatable by itself, and slow: order statistics have tests of their own.
SELECTED = "triton and not (test_backends and (repeatable or order))"

Results = dict[str, list[ElementTree.Element]]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def start(paths: list[Path], report: Path) -> subprocess.Popen[str]:
    options = ["-q", "-p", "no:cacheprovider", "-k", SELECTED, "-m", "not gpu", *QUIET]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *paths],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of each test, by module."""
    folder, found = tmp_path_factory.mktemp("triton"), defaultdict(list)
    reports = [folder / "kernels.xml", folder / "shared.xml"]
    running = [start(*work) for work in zip((KERNELS, SHARED), reports, strict=True)]
    for process, report in zip(running, reports, strict=True):
        output, _ = process.communicate()
        assert process.returncode in (0, 1), output
        for case in ElementTree.parse(report).iter("testcase"):
            found[case.get("classname", "")].append(case)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [module(path) for path in KERNELS + SHARED])
def test_in_the_interpreter(name: str, results: Results) -> None:
    if not results[name]:
        pytest.skip("no test of this module is for Triton")
    failed = [
        f"{case.get('name')}\n{outcome.text}"
        for case in results[name]
        for outcome in case
        if outcome.tag in ("failure", "error")
    ]
    assert not failed, "\n".join(failed)
