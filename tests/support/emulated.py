"""Builds the CUDA kernels for the host, where pc/emulation.h takes the GPU's place.

A kernel comes in by a file of tests/kernels/emulation: `<op>.cpp` adds its launchers to a module
for numpy arrays, and `drive_<op>.cpp` calls of them to a program that runs under sanitizers. Ninja
builds what changed, in build/emulation.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from support.compiled import ROOT, locked

BUILD = ROOT / "build/emulation"
SOURCES = sorted((ROOT / "tests/kernels/emulation").glob("*.cpp"))
DRIVEN = [path for path in SOURCES if path.stem.startswith("drive")]
BOUND = [path for path in SOURCES if path not in DRIVEN]
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Werror"]
HEADERS = {"emulation.so": "binding.h", "thread": "drive.h", "address": "drive.h"}
"""What all files of a target include first, compiled once."""

# The first one first: a binding.h is in csrc/cuda too, which needs CUDA.
FOLDERS = ["tests/kernels/emulation", "csrc/include", "csrc/cuda"]
PYTHON = [sysconfig.get_path("include"), pybind11.get_include()]
TARGETS: dict[str, tuple[list[Path], list[str], list[str]]] = {
    "emulation.so": (
        BOUND,
        ["-fPIC", "-fvisibility=hidden", *(f"-isystem{folder}" for folder in PYTHON)],
        ["-shared"],
    ),
    "thread": (DRIVEN, ["-fsanitize=thread"], ["-fsanitize=thread"]),
    "address": (
        DRIVEN,
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=address,undefined"],
    ),
}
"""Sources, and what to compile and to link them with."""

ORDERS = ["forward", "reversed", "shuffled"]
"""In which blocks run; by its place in here the module takes one."""


def rules() -> list[str]:
    """What ninja has to do."""
    compiler = shlex.join(
        [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *(f"-I{ROOT / f}" for f in FOLDERS)]
    )
    lines = [
        "rule compile",
        f"  command = {compiler} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule header",
        f"  command = {compiler} $flags -MD -MF $out.d -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $flags $in -o $out",
    ]
    for target, (sources, compiling, linking) in TARGETS.items():
        objects = {source: f"{target}.{source.stem}.o" for source in sources}
        flags = f"  flags = {shlex.join(compiling)}"
        lines += [f"build {target}.h.gch: header {target}.h", flags]
        for source, name in objects.items():
            lines += [f"build {name}: compile {source} | {target}.h.gch"]
            lines += [f"{flags} -include {target}.h"]
        lines += [f"build {target}: link {' '.join(objects.values())}"]
        lines += [f"  flags = {shlex.join(linking)}"]
    return lines


def build() -> None:
    """Builds all there is, in one process at a time; fails with what the compiler says."""
    with locked(BUILD):
        _build()


def _build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(rules()) + "\n")
    for target, header in HEADERS.items():
        # A header compiled by itself would lose its `#pragma once`.
        if not (BUILD / f"{target}.h").exists():
            (BUILD / f"{target}.h").write_text(f'#include "{header}"\n')
    ninja = shutil.which("ninja", path=os.path.dirname(sys.executable)) or "ninja"
    done = subprocess.run([ninja, "-C", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def load() -> ModuleType:
    """The module, built before."""
    spec = importlib.util.spec_from_file_location("emulation", BUILD / "emulation.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drive(sanitizer: str, *calls: str) -> subprocess.CompletedProcess[str]:
    """Runs the calls, or all without a planted mistake, under "thread" or "address"."""
    return subprocess.run(
        [BUILD / sanitizer, *calls],
        capture_output=True,
        text=True,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        timeout=120,
    )
