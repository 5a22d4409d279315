"""Launches of a layer on a GPU are counted, with a driver that launches nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_linear_layer_takes_three_launches(tmp_path: Path) -> None:
    out = tmp_path / "host.jsonl"
    command = [sys.executable, "-m", "bench", "host", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["launches"] == ["reduce_tiles", "_sum_positions", "_finish"]
