"""Every CUDA kernel compiles for the GPUs it is made for, and keeps its numbers in registers."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support import compiled

SOURCES = sorted(path.stem for path in (compiled.ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = [80, 90, 100]
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Kernel(NamedTuple):
    """What a compiled kernel takes: registers, and bytes of memory instead of them."""

    name: str
    registers: int
    memory: int


def kernels(report: str) -> dict[int, list[Kernel]]:
    """By target, of the output of `cuobjdump --dump-resource-usage`."""
    found: dict[int, list[Kernel]] = {}
    for part in report.split("Fatbin elf code:")[1:]:
        target = re.search(r"arch = sm_(\d+)", part)
        assert target
        found.setdefault(int(target[1]), []).extend(
            Kernel(name, int(registers), int(stack) + int(local))
            for name, registers, stack, local in USAGE.findall(part)
        )
    return found


def problems(kernel: Kernel) -> list[str]:
    """Why a kernel is slower than it needs to be."""
    found = []
    if kernel.memory:
        found.append(f"{kernel.memory} bytes of stack")
    if kernel.registers > 254:
        found.append(f"{kernel.registers} registers, which is all there are")
    return found


@pytest.fixture(scope="module")
def objects() -> Path:
    """What `_C_cuda` is linked from; that it links is part of it."""
    return compiled.library("cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compile_into_registers(objects: Path, name: str) -> None:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", objects / f"{name}.o"]
    found = kernels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert sorted(found) == TARGETS
    assert all(found.values())
    bad = [
        (target, kernel.name, *problems(kernel))
        for target, some in found.items()
        for kernel in some
        if problems(kernel)
    ]
    assert not bad


def test_what_is_wrong_with_a_kernel_is_found() -> None:
    report = """
Fatbin elf code:
================
arch = sm_90
 Function good:
  REG:28 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function bad:
  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    [good, bad] = kernels(report)[90]
    assert not problems(good)
    assert problems(bad) == ["16 bytes of stack", "255 registers, which is all there are"]


def test_ci_does_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match="CI must have nvcc"):
        compiled.library("cuda")
