"""Builds the native libraries; everything else about the package is said in pyproject.toml.

csrc/cpu/*.cpp become pycoherence/_C_cpu.abi3.so and csrc/cuda/*.cu _C_cuda.abi3.so: a file there is
built because it is there. Both use the stable ABI of LibTorch and no Python API, so that one build
serves every torch >= 2.10 and Python >= 3.10. Building imports no torch, needs no CUDA in it and no
device. The outcome goes to pycoherence/_build.json, for `python -m pycoherence info` to print.

PYCOHERENCE_BUILD     auto (default): for this machine, a failure being a warning; CUDA kernels,
                      which take minutes, only if a GPU is here, for it alone, or GPUs are named
                      cpu or cuda: that must build (cuda means both, for all GPUs); none: a pure
                      Python package
TORCH_CUDA_ARCH_LIST  GPUs to build for, such as "8.0;9.0+PTX"
MAX_JOBS              compilers run at the same time
CXX, CXXFLAGS, LDFLAGS and CUDA_HOME mean what they usually do.
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

LIBRARIES = {"auto": ["cpu", "cuda"], "cpu": ["cpu"], "cuda": ["cpu", "cuda"], "none": []}
SOURCES = {"cpu": "csrc/cpu/*.cpp", "cuda": "csrc/cuda/*.cu"}
MODE = os.environ.get("PYCOHERENCE_BUILD") or "auto"
RECORD = "pycoherence/_build.json"
NINJA_FILE = """\
builddir = {folder}
rule compile
  command = {compile} -MD -MF $out.d -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out
  description = link $out
{compile_each}
build {library}: link {objects}
"""
FLAGS = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc/include"]
GPUS = ["8.0", "9.0", "10.0"]
ERROR_LINE = re.compile(r"\b(error|fatal)\s*:|undefined reference|\bld: ")


class BuildError(Exception):
    """A library cannot be built; the message is the one line that `info` shows."""


def output_of(what: str, command: list[str]) -> str:
    """The output of a tool; BuildError if it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{what} does not work: {shlex.join(command)}") from error


def find_cxx() -> list[str]:
    """The C++ compiler, $CXX or the first on PATH; BuildError if it does not even start."""
    found = [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    command = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if not command:
        raise BuildError("no C++ compiler found: install g++ or set CXX")
    output_of("C++ compiler", [*command, "--version"])
    return command


def find_tool(name: str, folder: str, advice: str) -> str:
    """A program in the folder or on PATH."""
    found = shutil.which(name, path=folder) or shutil.which(name)
    if not found:
        raise BuildError(f"{name} not found {advice}")
    return found


def find_nvcc() -> str:
    """The CUDA compiler."""
    return find_tool("nvcc", f"{os.environ.get('CUDA_HOME', '')}/bin", "in CUDA_HOME or on PATH")


def find_torch() -> Path:
    """The folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch not found: install it first, or drop --no-build-isolation")
    return Path(spec.origin).parent


def gpus_asked() -> list[str]:
    """Compute capabilities to build for: those named, or in mode "auto" those of this machine."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if named or MODE != "auto":
        return named
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return sorted(set(output_of("nvidia-smi", command).split()))
    except BuildError:
        return []


def gpu_flags(nvcc: str) -> list[str]:
    """The -gencode flags for the GPUs that are asked for, or for the default ones of this nvcc."""
    gpus = gpus_asked()
    if not gpus:
        known = output_of("nvcc", [nvcc, "--list-gpu-arch"]).split()
        gpus = [gpu for gpu in GPUS if f"compute_{gpu.replace('.', '')}" in known]
        gpus[-1] += "+PTX"
    flags = []
    for gpu in gpus:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", gpu)
        if not match:
            raise BuildError(f'TORCH_CUDA_ARCH_LIST: expected "8.0" or "9.0+PTX", got "{gpu}"')
        arch = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    return flags


def commands(kind: str) -> tuple[list[str], list[str]]:
    """The compile and the link command of a library, without their inputs and outputs."""
    torch, cxx = find_torch(), find_cxx()
    include = ["-isystem", f"{torch}/include"]
    link = ["-shared", f"-L{torch}/lib", "-Xlinker", "--no-as-needed", "-ltorch_cpu"]
    if kind == "cpu":
        # Last, so that they have the last word.
        asked = shlex.split(os.environ.get("CXXFLAGS", ""))
        link += ["-Xlinker", "--no-undefined", *shlex.split(os.environ.get("LDFLAGS", ""))]
        host = ["-Wall", "-Wno-psabi", "-fPIC", "-fvisibility=hidden"]
        return [*cxx, *FLAGS, *host, *include, *asked], [*cxx, *asked, *link]
    nvcc = [find_nvcc()]
    # nvcc takes a program for its host compiler, not a command line such as "ccache g++".
    if "CXX" in os.environ and len(cxx) == 1:
        nvcc += ["-ccbin", *cxx]
    host = ["-Xcompiler", "-Wall,-fPIC,-fvisibility=hidden"]
    # libtorch.so pulls in libtorch_cuda.so where torch has CUDA; the torch of the build need not.
    link += ["-ltorch", "-cudart", "static"]
    return [*nvcc, *FLAGS, "-DUSE_CUDA", *host, *gpu_flags(nvcc[0]), *include], [*nvcc, *link]


def jobs() -> int:
    """How many compilers to run at once: MAX_JOBS, or what the cores and the memory allow."""
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    allowed = min(len(os.sched_getaffinity(0)), gigabytes // 2)
    return int(os.environ.get("MAX_JOBS") or max(1, allowed))


def write_ninja_file(kind: str, sources: list[str]) -> tuple[Path, Path]:
    """Writes what ninja has to do for a library; returns that file and the library it makes."""
    compile_command, link_command = commands(kind)
    folder = Path("build/native", kind)
    library = folder / f"_C_{kind}.abi3.so"
    objects = {source: folder / f"{Path(source).stem}.o" for source in sources}
    text = NINJA_FILE.format(
        folder=folder,
        compile=shlex.join(compile_command).replace("$", "$$"),
        link=shlex.join(link_command).replace("$", "$$"),
        compile_each="\n".join(f"build {obj}: compile {src}" for src, obj in objects.items()),
        objects=" ".join(map(str, objects.values())),
        library=library,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    return folder / "build.ninja", library


def compile_library(kind: str, sources: list[str]) -> Path:
    """Compiles what changed since the last time; returns the library, in the build folder."""
    if sys.platform != "linux":
        raise BuildError("native code is built on Linux only")
    ninja_file, library = write_ninja_file(kind, sources)
    # Without an active environment the ninja of its Python package is not on PATH.
    ninja = find_tool("ninja", os.path.dirname(sys.executable), "(pip install ninja)")
    command = [ninja, "-f", str(ninja_file), "-j", str(jobs())]
    lines: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as running:
        for line in running.stdout or ():
            lines.append(line.rstrip())
            print(lines[-1], flush=True)  # as it happens: it takes a minute or more
    if running.returncode:
        errors = list(filter(ERROR_LINE.search, lines)) or lines[-2:]
        raise BuildError(f"compile failed: {errors[0].strip()}")
    return library


def versions() -> dict[str, str | None]:
    """The tools at hand; None for one that is missing."""
    found: dict[str, str | None] = dict.fromkeys(("torch", "compiler", "nvcc"))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["torch"] = importlib.metadata.version("torch")
    with contextlib.suppress(BuildError):
        found["compiler"] = output_of("C++ compiler", [*find_cxx(), "--version"]).splitlines()[0]
    with contextlib.suppress(BuildError):
        found["nvcc"] = output_of("nvcc", [find_nvcc(), "--version"]).splitlines()[-1]
    return found


class Build(build):
    """Runs build_ext in every mode: a package without libraries also records why it has none."""

    sub_commands = (("build_py", None), ("build_ext", None))


class BuildNative(build_ext):
    """Builds each library, and records which were built and why the others were not."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name under every Python: the libraries do not use its ABI."""
        return f"{fullname.replace('.', '/')}.abi3.so"

    def get_output_mapping(self) -> dict[str, str]:
        """Adds the record to the files that a strict editable install links to."""
        record = {f"{self.build_lib}/{RECORD}": RECORD} if self.inplace else {}
        return {**super().get_output_mapping(), **record}

    def run(self) -> None:
        """Builds what PYCOHERENCE_BUILD asks for and writes the record beside it."""
        if MODE == "cuda":
            try:
                find_nvcc()  # before anything takes minutes
            except BuildError as error:
                raise SystemExit(f"pycoherence: cannot build _C_cuda: {error}") from error
        self.mkpath(f"{self.build_lib}/pycoherence")
        reasons = {kind: self.build_library(kind) for kind in SOURCES}
        self.extensions = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()
        ]
        outcome = {kind: {"built": why is None, "reason": why} for kind, why in reasons.items()}
        record = json.dumps({"mode": MODE, **versions(), **outcome}, indent=2)
        Path("." if self.inplace else self.build_lib, RECORD).write_text(record + "\n")

    def build_library(self, kind: str) -> str | None:
        """Builds one library into its place; returns why not, and leaves no older one behind."""
        target = Path(self.get_ext_fullpath(f"pycoherence._C_{kind}"))
        target.unlink(missing_ok=True)
        if kind not in LIBRARIES[MODE]:
            return f"PYCOHERENCE_BUILD={MODE}"
        if kind == "cuda" and MODE == "auto" and not gpus_asked():
            return "no GPU was here; PYCOHERENCE_BUILD=cuda builds for all"
        try:
            library = compile_library(kind, sorted(glob.glob(SOURCES[kind])))
        except BuildError as error:
            if MODE != "auto":
                raise SystemExit(f"pycoherence: cannot build _C_{kind}: {error}") from error
            self.warn(f"pycoherence is installed without _C_{kind}: {error}")
            return str(error)
        self.copy_file(str(library), str(target))
        return None


if MODE not in LIBRARIES:
    raise SystemExit(f"PYCOHERENCE_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")

if __name__ == "__main__":
    # Free-threaded Python takes no abi3 wheels.
    wheel = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
    triton = "pycoherence.triton_kernels"
    setup(
        packages=[
            *find_packages(include=["pycoherence", "pycoherence.*"]),
            *(f"pycoherence.{name}" for name in find_packages(include=["triton_kernels*"])),
        ],
        package_dir={"pycoherence": "pycoherence", triton: "triton_kernels"},
        ext_modules=[
            Extension(f"pycoherence._C_{kind}", sorted(glob.glob(SOURCES[kind])))
            for kind in LIBRARIES[MODE]
        ],
        cmdclass={"build": Build, "build_ext": BuildNative},
        options={"bdist_wheel": wheel},
    )
