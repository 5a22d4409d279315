"""Every Triton kernel compiles for the GPUs it is made for, within what they have; see `aot.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from aot import TARGETS, Row, problems, steps_of, table, waits, written

OLDEST = Path(sys.prefix) / "triton-oldest"
"""The oldest Triton that is supported, where `make test` puts it."""

needs_oldest = pytest.mark.skipif(not OLDEST.is_dir(), reason="make test installs an older Triton")
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")


def run(script: str, *options: str, oldest: bool = False) -> None:
    """Run a script of `tests` in a process of its own: this one knows of no GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    if oldest:
        environment["PYTHONPATH"] = str(OLDEST)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / script), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def compile_all(folder: Path, *options: str, oldest: bool = False) -> list[Row]:
    out = folder / "kernels.jsonl"
    run("aot.py", "--out", str(out), *options, oldest=oldest)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """All kernels."""
    return compile_all(tmp_path_factory.mktemp("aot"))


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


@pytest.mark.slow
@needs_oldest
def test_kernels_compile_with_the_oldest_triton(tmp_path: Path) -> None:
    found = compile_all(tmp_path, "--targets", "90", oldest=True)
    assert found
    bad = [row for row in found if problems(row)]
    assert not bad, table(bad)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("oldest", [False, pytest.param(True, marks=needs_oldest)])
def test_launchers_hand_on_what_kernels_take(oldest: bool, rows: list[Row]) -> None:
    """All calls and dtypes, against a driver that launches nothing; see `launchers.py`."""
    assert rows  # compiled by now
    run("launchers.py", oldest=oldest)


def test_what_is_wrong_with_a_kernel_is_found() -> None:
    good: Row = {
        "op": "linear_reduce", "kind": "bfloat16", "capability": 90, "call": "", "kernel": "k",
        "warps": 8, "stages": 3, "registers": 128, "stack": 0, "shared": 98336,
        "dots": ["128x64xbf16 * 64x128xbf16"], "instructions": {"wgmma.mma_async": 4},
        "waits": [2], "steps": [],
    }  # fmt: skip
    assert problems(good) == problems(good | {"stack": 8}) == []
    step = {"instructions": 107, "spills": 8, "serialised": False}
    assert problems(good | {"stack": 96, "warps": 16, "steps": [step]}) == []
    for change, problem in (
        ({"stack": 40}, "spills 40 bytes"),
        ({"stack": 8, "registers": 255}, "spills 8 bytes"),
        ({"stack": 80, "steps": [step | {"spills": 9}]}, "spills 80 bytes"),
        ({"stack": 8, "registers": 255, "steps": [step]}, "spills 8 bytes"),
        ({"stack": 136, "steps": [step]}, "spills 136 bytes"),
        ({"steps": [step, step | {"serialised": True}]}, "each product waits for the one before"),
        ({"registers": 255, "warps": 16}, "255 registers in 16 warps"),
        ({"shared": 240000}, "240000 bytes of shared memory, 232448 are there"),
        ({"instructions": {"mma.sync": 64}}, "no wgmma.mma_async"),
        ({"kind": "tf32", "instructions": {}}, "no mma"),
        ({"waits": [2, 0]}, "a loop waits for the loads of its own step"),
    ):
        assert problems(good | change) == [problem]
    assert problems(good | {"kind": "float32", "instructions": {}}) == []
    assert problems(good | {"stages": 2, "waits": [0]}) == []
    assert "no mma.sync" in table([good | {"capability": 80}])


def test_waits_are_read_loop_by_loop() -> None:
    ttgir = """
      tt.func public @k() {
        ttg.async_wait %t {num = 0 : i32}
        %a:2 = scf.for %i = %l to %u step %s iter_args(%x = %y) -> (i32) {
          %c = ttg.async_copy_global_to_local %p, %m : tensor
          ttg.async_wait %t {num = 2 : i32}
          %r = scf.if %b -> (i32) {
            ttg.async_wait %t {num = 1 : i32}
            scf.yield %x : i32
          } else {
            scf.yield %y : i32
          }
          scf.yield %r : i32
        }
        scf.for %i = %l to %u step %s {
          ttg.async_wait %t {num = 0 : i32}
        }
        scf.for %i = %l to %u step %s {
          %c = ttg.async_copy_global_to_local %p, %m : tensor
          ttg.async_wait %t {num = 0 : i32}
        }
      }
    """
    assert waits(ttgir) == [2, 0]


def test_steps_are_read_from_instructions() -> None:
    """The loop of products, without the end of an example and without waiting."""
    lines = [
        "STL [R1], RZ ;", "BAR.SYNC ;", "@!P2 BRA 0x00a0 ;", "HGMMA.64x128x16.F32 R24, R24 ;",
        "@!P0 BRA 0x0070 ;", "STL [R1], R3 ;", "LDL R3, [R1] ;", "IADD3 R1, R2, R3 ;",
        "@P1 BRA 0x0010 ;", "EXIT ;", "BRA 0x0030 ;",
    ]  # fmt: skip
    sass = "\n".join(f"/*{16 * i:04x}*/  {line}" for i, line in enumerate(lines))
    found = {"instructions": 6, "spills": 0, "serialised": False}
    assert steps_of(sass) == [found]
    kept = sass.replace("@!P0 BRA 0x0070", "NOP")
    assert steps_of(kept) == [found | {"instructions": 8, "spills": 2}]
    each = sass.replace("IADD3 R1, R2, R3", "HGMMA.64x128x16.F32 R24, gsb0")
    assert steps_of(each) == [found]
    each = each.replace("R24, R24", "R24, gsb0")
    assert steps_of(each) == [found | {"serialised": True}]
    assert steps_of(sass.replace("HGMMA", "FFMA")) == []
