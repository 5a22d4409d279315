"""Tests of Triton kernels in its interpreter, all in one process of their own.

By hand: `TRITON_INTERPRET=1 pytest tests/triton/test_NAME.py`. bfloat16 is left out, since the
interpreter computes it wrongly.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "tests" / "triton").glob("test_*.py"))

# Tests of all backends, of which the interpreter runs those of Triton.
SHARED = [
    ROOT / "tests" / "ops" / f"test_{name}.py" for name in ("backends", "views", "not_finite")
]

# It is numpy that multiplies there, and it warns of what is not finite.
QUIET = ["-W", "ignore::RuntimeWarning"]

# The interpreter is repeatable by itself, and slow: order statistics have tests of their own.
SELECTED = "triton and not (test_backends and (repeatable or order))"

Results = dict[str, list[ElementTree.Element]]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What became of each test, by module."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-k", SELECTED, "-m", "not gpu", *QUIET]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *KERNELS, *SHARED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout
    found: Results = defaultdict(list)
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
