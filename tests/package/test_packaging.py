"""What users install: the sdist, the wheel built from it, and packages without native code."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from support import compiled

ROOT = Path(__file__).parents[2]
SYSTEM = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
STABLE = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$|^(aoti_)?torch_\w+$")
SETTINGS = ("PYCOHERENCE_", "PYTHON", "CXX", "TORCH_CUDA_ARCH_LIST")


def run(*command, cwd, **env):
    """Runs a command as a user would, whatever settings the tests themselves run under."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(*command, cwd, **env):
    done = run(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(kind, folder, out, **env):
    command = (sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out)
    check(*command, folder, cwd=out, **env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What users get as sources."""
    out = tmp_path_factory.mktemp("sdist")
    build("sdist", ROOT, out)
    return next(out.glob("*.tar.gz"))


def unpacked(sdist, folder):
    check("tar", "-xf", sdist, cwd=folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The sdist, unpacked."""
    return unpacked(sdist, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """What the sdist makes; what is compiled of the same sources is taken over."""
    for kind in ["cpu"] + ["cuda"] * compiled.has_nvcc():
        compiled.library(kind)
    tree = unpacked(sdist, tmp_path_factory.mktemp("tree"))
    with compiled.locked():
        shutil.copytree(compiled.BUILD, tree / "build/native")
    out = tmp_path_factory.mktemp("wheel")
    build("wheel", tree, out, PYCOHERENCE_BUILD="cuda" if compiled.has_nvcc() else "cpu")
    return next(out.glob("*.whl"))


class Environment:
    """A new virtual environment; it sees the packages of the outer one, except its pycoherence."""

    def __init__(self, folder):
        venv.create(folder / "venv")
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.packages = check(
            self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
        # A folder named in a .pth file is searched after this one's own, and its own .pth files,
        # an editable pycoherence among them, are not read.
        outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        Path(self.packages, "outer.pth").write_text("\n".join(outer))

    def install(self, what, **env):
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install"]
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
        return check(*pip, *options, what, cwd=self.folder, **env)

    def pycoherence(self, *args):
        return run(self.python, "-m", "pycoherence", *args, cwd=self.folder)

    def wheel_metadata(self):
        return next(Path(self.packages).glob("pycoherence-*.dist-info/WHEEL")).read_text()

    def record(self):
        """What was built, as the installed package says; it must be the one of this environment."""
        command = (self.python, "-c", "import pycoherence; print(pycoherence.__file__)")
        package = Path(check(*command, cwd=self.folder).strip()).parent
        assert package == Path(self.packages, "pycoherence")
        return json.loads((package / "_build.json").read_text())


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def source_files(root):
    """The files below the folders that a build reads, by their path from `root`."""
    files = (
        p for name in ("csrc", "pycoherence", "triton_kernels") for p in (root / name).rglob("*")
    )
    built = (".pyc", ".so")
    return {p.relative_to(root) for p in files if p.is_file() and p.suffix not in built}


def test_sdist_holds_the_sources_and_nothing_built(source):
    assert source_files(source) == source_files(ROOT) - {Path("pycoherence/_build.json")}
    assert not [p for p in source.rglob("*") if p.suffix in (".so", ".pyc")]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    name_and_version = "-".join(wheel.name.split("-")[:2])
    top = {name.split("/")[0] for name in names}
    assert top == {"pycoherence", f"{name_and_version}.dist-info"}
    for module in (ROOT / "triton_kernels").rglob("*.py"):
        assert f"pycoherence/{module.relative_to(ROOT)}" in names
    assert "pycoherence/py.typed" in names
    assert "pycoherence/_build.json" in names


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_libraries_of_the_wheel_need_only_the_stable_abi(wheel, tmp_path, kind):
    """So that one build serves every torch and Python."""
    if kind == "cuda" and not compiled.has_nvcc():
        pytest.skip("needs nvcc")
    library = zipfile.ZipFile(wheel).extract(f"pycoherence/_C_{kind}.abi3.so", tmp_path)
    names = {line.split()[1] for line in symbols("--undefined-only", library) if " U " in line}
    assert "aoti_torch_abi_version" in names
    assert not unstable(names)
    # What torch for CPUs lacks must be about CUDA.
    torch_cpu = symbols("--defined-only", f"{Path(torch.__file__).parent}/lib/libtorch_cpu.so")
    missing = {name for name in names if "torch_" in name} - {x.split()[-1] for x in torch_cpu}
    assert not [name for name in missing if kind == "cpu" or "_cuda_" not in name]
    loaded = check("readelf", "--dynamic", library, cwd=tmp_path)
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", loaded)}
    assert "libtorch_cpu" in needed
    assert needed <= {"libtorch_cpu", "libtorch", *SYSTEM}
    assert "PATH" not in loaded  # of the machine that built it


def symbols(which, library):
    return check("nm", "--dynamic", which, library, cwd=ROOT).splitlines()


def unstable(names):
    """Those that are neither of the C and C++ libraries nor of LibTorch's stable ABI, in C."""
    return [name for name in names if not STABLE.search(name)]


def test_what_is_not_stable_is_found():
    stable = ["aoti_torch_get_size", "torch_parallel_for", "memcpy@GLIBC_2.14"]
    others = ["_ZN2at4_ops3add4callERKNS_6TensorES4_", "_ZN3c104HalfE", "PyErr_SetString"]
    assert unstable(stable + others) == others


def test_installed_wheel_passes_selftest(wheel, environment):
    environment.install(wheel)
    record = environment.record()
    assert record["cpu"] == {"built": True, "reason": None}
    assert record["cuda"]["built"] == compiled.has_nvcc()
    done = environment.pycoherence("selftest")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("settings", "reason", "tag"),
    [
        ({"PYCOHERENCE_BUILD": "none"}, "PYCOHERENCE_BUILD=none", "py3-none-any"),
        (
            {"CXX": "false", "TORCH_CUDA_ARCH_LIST": "9.0"},
            "C++ compiler does not work: false --version",
            "cp310-abi3",
        ),
    ],
    ids=["none", "broken-compiler"],
)
def test_install_without_native_code_says_why(source, environment, settings, reason, tag):
    environment.install(source, **settings)
    assert f"Tag: {tag}" in environment.wheel_metadata()
    record = environment.record()
    assert record["cpu"] == record["cuda"] == {"built": False, "reason": reason}
    done = environment.pycoherence("info")
    assert done.returncode == 0, done.stdout
    assert reason in " ".join(done.stdout.split())


def test_compile_error_is_recorded_and_fatal_only_when_asked_for(source, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("*.cpp", "*.cu", "build"))
    (tree / "csrc" / "cpu" / "broken.cpp").write_text("#error this kernel is broken\n")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    check(*build, cwd=tree, TORCH_CUDA_ARCH_LIST="none")
    record = json.loads((tree / "pycoherence" / "_build.json").read_text())
    assert record["cpu"]["reason"].startswith("compile failed: csrc/cpu/broken.cpp:1")
    assert record["cpu"]["reason"].endswith("this kernel is broken")
    assert not record["cuda"]["built"]
    assert run(*build, cwd=tree, PYCOHERENCE_BUILD="cpu").returncode != 0


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU may be here")
def test_no_cuda_kernel_is_built_where_no_gpu_is(source, tmp_path):
    """They would take minutes, and could not run."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build"))
    check(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, CXX="false")
    record = json.loads((tree / "pycoherence" / "_build.json").read_text())
    reason = "no GPU was here; PYCOHERENCE_BUILD=cuda builds for all"
    assert record["cuda"] == {"built": False, "reason": reason}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"PYCOHERENCE_BUILD": "cuda", "CUDA_HOME": "", "PATH": "/usr/bin:/bin"},
            "cannot build _C_cuda: nvcc not found",
        ),
        ({"PYCOHERENCE_BUILD": "nonsense"}, "expected auto, cpu, cuda or none, got 'nonsense'"),
        (
            {"PYCOHERENCE_BUILD": "cpu", "CXX": "false"},
            "cannot build _C_cpu: C++ compiler does not",
        ),
    ],
    ids=["cuda", "nonsense", "cpu"],
)
def test_setting_that_cannot_be_met_fails_clearly(source, settings, message):
    done = run(sys.executable, "setup.py", "build", cwd=source, **settings)
    assert done.returncode != 0
    assert message in done.stdout


def test_source_folder_refuses_to_be_the_other_triton_kernels():
    done = run(sys.executable, "-c", "import triton_kernels", cwd=ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stdout
    assert "pycoherence.triton_kernels" in done.stdout
