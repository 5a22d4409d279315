"""Every CUDA kernel compiles for the GPUs it is made for, and keeps its numbers in registers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = [80, 90, 100]
BUILD = ROOT / "build/cuda_compile"
NINJA_FILE = """\
rule compile
  command = {nvcc} -arch=sm_$target $in -o $out -MD -MF $out.d > $out.txt 2>&1 $
    || (cat $out.txt; false)
  depfile = $out.d
  deps = gcc
"""
REPORT = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """What ptxas says of a kernel: bytes of stack, those of them spilled to, and registers."""

    name: str
    stack: int
    spilled: int
    registers: int


def kernels(report: str) -> list[Kernel]:
    """Of the output of `ptxas -v`."""
    return [
        Kernel(name, int(stack), int(spilled), int(registers))
        for name, stack, spilled, registers in REPORT.findall(report)
    ]


def problems(kernel: Kernel) -> list[str]:
    """Why a kernel is slower than it needs to be."""
    found = []
    if kernel.stack or kernel.spilled:
        found.append(f"{kernel.stack} bytes of stack, {kernel.spilled} bytes spilled")
    if kernel.registers > 254:
        found.append(f"{kernel.registers} registers, which is all there are")
    return found


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int], str]:
    """What ptxas says, by file and target; compiled again only if something changed."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which(
        "nvcc"
    )
    if nvcc is None:
        assert os.environ.get("CI") != "true", "CI must have nvcc: no CUDA kernel was compiled"
        pytest.skip("needs nvcc")
    include = [f"-I{ROOT / 'csrc/include'}", "-isystem", f"{Path(torch.__file__).parent}/include"]
    flags = "-std=c++20 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA -cubin -Xptxas -v"
    text = NINJA_FILE.format(nvcc=" ".join([nvcc, *flags.split(), *include]))
    for name in SOURCES:
        for target in TARGETS:
            text += f"build {name}.{target}: compile {ROOT}/csrc/cuda/{name}.cu\n"
            text += f"  target = {target}\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(text)
    ninja = shutil.which("ninja", path=os.path.dirname(sys.executable)) or "ninja"
    done = subprocess.run([ninja, "-C", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return {
        (name, target): (BUILD / f"{name}.{target}.txt").read_text()
        for name in SOURCES
        for target in TARGETS
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compile_into_registers(reports, name, target):
    found = kernels(reports[name, target])
    assert found
    assert f"for 'sm_{target}'" in reports[name, target]
    bad = {kernel.name: problems(kernel) for kernel in found if problems(kernel)}
    assert not bad


def test_spills_are_found():
    report = """ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
ptxas info    : Function properties for bad
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    good, bad = kernels(report)
    assert not problems(good)
    assert problems(bad) == [
        "16 bytes of stack, 8 bytes spilled",
        "255 registers, which is all there are",
    ]


def test_ci_does_not_skip(monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match="CI must have nvcc"):
        reports.__wrapped__()
