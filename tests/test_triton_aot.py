"""Every Triton kernel compiles for the GPUs it is made for, within what they have; see `aot.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import TARGETS, Row, problems, table, written


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """All kernels, compiled in processes of their own: this one knows of no GPU."""
    out = tmp_path_factory.mktemp("aot") / "kernels.jsonl"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot.py")), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("op", written())
def test_kernels_compile_within_the_means_of_a_gpu(
    op: str, capability: int, rows: list[Row]
) -> None:
    found = [row for row in rows if (row["op"], row["capability"]) == (op, capability)]
    assert found
    bad = [row for row in found if problems(row)]
    assert not bad, table(bad)


def test_what_is_wrong_with_a_kernel_is_found() -> None:
    good: Row = {
        "op": "linear_reduce", "kind": "bfloat16", "capability": 90, "call": "", "kernel": "k",
        "warps": 8, "stages": 3, "registers": 128, "stack": 0, "shared": 98336,
        "dots": ["128x64xbf16 * 64x128xbf16"], "instructions": {"wgmma.mma_async": 4},
    }  # fmt: skip
    assert problems(good) == problems(good | {"stack": 8}) == []
    for change, problem in (
        ({"stack": 40}, "spills 40 bytes"),
        ({"stack": 8, "registers": 255}, "spills 8 bytes"),
        ({"registers": 255, "warps": 16}, "255 registers in 16 warps"),
        ({"shared": 240000}, "240000 bytes of shared memory, 232448 are there"),
        ({"instructions": {"mma.sync": 64}}, "no wgmma.mma_async"),
        ({"kind": "tf32", "instructions": {}}, "no mma"),
    ):
        assert problems(good | change) == [problem]
    assert problems(good | {"kind": "float32", "instructions": {}}) == []
    assert "no mma.sync" in table([good | {"capability": 80}])
