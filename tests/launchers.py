"""Calls Triton's launchers of all kernels, with a driver that launches nothing.

    python tests/launchers.py [--ops OP ...]

Between the code of an op and a kernel lies the launcher, which neither the interpreter nor a
compilation touches: it is compiled for the arguments of a kernel, and hands them to the CUDA
driver. Here the driver is `fake_libcuda.c`. Each launch of each call of `aot_calls.py` must give it
the grid and the arguments, in the order and of the size in which the kernel's PTX takes them.
"""

import argparse
import ctypes
import importlib
import inspect
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aot import compiled, written
from aot_calls import KINDS, calls
from torch import Tensor

_HERE = Path(__file__).parent
_CAPABILITY = 90
_BYTES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}
_BYTES |= {"u16": 2, "s16": 2, "b16": 2, "u8": 1, "s8": 1, "b8": 1}
_SCRATCH = 2
"""So many pointers, which Triton allocates itself, may follow the arguments of a kernel."""


def library(folder: Path) -> Path:
    """Compile the driver."""
    path = folder / "libcuda.so.1"
    source = _HERE / "fake_libcuda.c"
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", str(source)]
    subprocess.run([*command, "-o", str(path)], check=True)
    (folder / "libcuda.so").symlink_to(path.name)
    return path


class _Launches:
    """Checks every launch of a kernel.

    Attributes:
        checked: How many there were.
        problems: What was wrong.
    """

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.checked = 0
        self.problems: list[str] = []
        self._driver = driver
        self._pointers: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def pointer(self, x: Tensor) -> int:
        """A pointer of its own for a tensor that has no memory."""
        if id(x) not in self._pointers:
            self._kept.append(x)
            self._pointers[id(x)] = 0x7000_0000_0000 + 0x1000 * len(self._pointers)
        return self._pointers[id(x)]

    def check(self, function: Any, kernel: Any, args: Any, options: Any, launch: Any) -> None:
        """Launch a kernel and compare what arrives."""
        parameters = inspect.signature(function.fn).parameters
        given = {name: value for name, value in options.items() if name in parameters}
        bound = inspect.signature(function.fn).bind(*args, **given).arguments
        kinds = kernel.src.signature.items()
        expected = [n for name, kind in kinds for n in self._numbers(kind, bound[name])]
        sizes = [_BYTES[kind] for kind in _parameters(kernel.asm["ptx"])]
        self._driver.fake_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        data_ptr = Tensor.data_ptr
        Tensor.data_ptr = lambda x: self.pointer(x)  # pyright: ignore
        try:
            launch(function, *args, **{**options, "warmup": False})
        finally:
            Tensor.data_ptr = data_ptr
        found, rest = (ctypes.c_uint64 * 256)(), (ctypes.c_uint * 5)()
        self._driver.fake_get(found, rest)
        self.checked += 1
        name, more = function.fn.__name__, len(sizes) - len(expected)
        if found[: len(expected)] != expected or not 0 <= more <= _SCRATCH:
            self.problems.append(f"{name}: {found[: len(sizes)]} arrive for {expected}")
        threads = 32 * kernel.metadata.num_warps
        if rest[:4] != [*(*options["grid"], 1, 1)[:3], threads]:
            self.problems.append(f"{name}: grid and threads {rest[:4]} for {options['grid']}")
        if rest[4] != self.checked:
            self.problems.append(f"{name}: {rest[4]} launches, not {self.checked}")

    def _numbers(self, kind: Any, value: Any) -> Iterator[int]:
        """The bits of what a kernel takes of an argument, as numbers without sign."""
        if isinstance(kind, (tuple, list)):
            for each, item in zip(kind, value, strict=True):
                yield from self._numbers(each, item)
        elif kind == "constexpr":
            return
        elif isinstance(value, Tensor):
            yield self.pointer(value)
        elif kind in ("fp32", "fp64"):
            to, of = ("I", "f") if kind == "fp32" else ("Q", "d")
            yield struct.unpack(to, struct.pack(of, value))[0]
        else:
            yield int(value) % 2 ** int(kind[1:])


def _parameters(ptx: str) -> list[str]:
    entry = ptx[ptx.index(".entry") :]
    return re.findall(r"\.param \.(\w+)", entry[: entry.index(")")])


def check(ops: Iterable[str], driver: Path) -> _Launches:
    """Check the launches of ops."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.driver import driver as active
    from triton.runtime.jit import JITFunction

    found = _Launches(ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL))
    launch = JITFunction.run
    for op in ops:
        function = getattr(importlib.import_module(f"pycoherence.triton_kernels.{op}"), op)
        for kind in KINDS:
            for _, args in calls(op, kind, _CAPABILITY):
                with compiled(_CAPABILITY, kind == "tf32"):
                    active.active.launcher_cls, active.active.utils = CudaLauncher, CudaUtils()
                    JITFunction.run = partialmethod(_both, JITFunction.run, launch, found)
                    function(*args)
    return found


def _both(
    self: Any, compile_only: Any, launch: Any, found: _Launches, *args: Any, **options: Any
) -> Any:
    kernel = compile_only(self, *args, **options)
    found.check(self, kernel, args, options, launch)
    return kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", metavar="OP", default=written())
    options = parser.parse_args()
    folder = os.environ.get("TRITON_LIBCUDA_PATH")
    if folder is None:
        # The dynamic linker reads its path when a process starts.
        with TemporaryDirectory() as made:
            library(Path(made))
            environment = {**os.environ, "LD_LIBRARY_PATH": made, "TRITON_LIBCUDA_PATH": made}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    found = check(options.ops, Path(folder) / "libcuda.so.1")
    print(f"{found.checked} launches")
    print("\n".join(found.problems[:20]))
    sys.exit(1 if found.problems or not found.checked else 0)


if __name__ == "__main__":
    main()
