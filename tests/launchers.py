"""Calls Triton's launchers of all kernels, with a driver that launches nothing.

    python tests/launchers.py [--ops OP ...]

Between the code of an op and a kernel lies the launcher, which neither the interpreter nor a
compilation touches: it is compiled for the arguments of a kernel, and hands them to the CUDA
driver. Here the driver is `support/fake_libcuda.c`. Each launch of each call of
`support/aot_calls.py` must give it the grid and the arguments, in the order and of the size in
which the kernel's PTX takes them.
"""

import argparse
import ctypes
import os
import re
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from aot import Driver, function_of, precise, written
from support.aot_calls import KINDS, calls
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pycoherence.ops.core.outputs import mask
from pycoherence.triton_kernels.launch import tape
from pycoherence.triton_kernels.launch.together import together

_DRIVER = Path(__file__).parent / "support/fake_libcuda.c"
_CAPABILITY = 90
_BYTES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}
_BYTES |= {"u16": 2, "s16": 2, "b16": 2, "u8": 1, "s8": 1, "b8": 1}
_SCRATCH = 2
"""So many pointers, which Triton allocates itself, may follow the arguments of a kernel."""


def library(folder: Path) -> Path:
    """Compile the driver."""
    path = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{path.name}", str(_DRIVER)]
    subprocess.run([*command, "-o", str(path)], check=True)
    (folder / "libcuda.so").symlink_to(path.name)
    return path


def load(folder: Path) -> ctypes.CDLL:
    """The driver, for all of the process."""
    return ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


class _Launches:
    """Checks every launch of a kernel.

    Attributes:
        checked: How many there were.
        tapes: How many calls can be done again by a tape.
        problems: What was wrong.
        log: Of each launch, the kernel, the grid and what arrived.
    """

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.checked = self.tapes = 0
        self.log: list[tuple[Any, ...]] = []
        self.problems: list[str] = []
        self._driver = driver
        self._pointers: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def pointer(self, x: Tensor) -> int:
        """A pointer for a tensor that has no memory, the same for all views of one."""
        storage = x.untyped_storage()
        if storage._cdata not in self._pointers:
            self._kept.append(x)
            self._pointers[storage._cdata] = 0x7000_0000_0000 + (len(self._pointers) << 32)
        return self._pointers[storage._cdata] + x.storage_offset() * x.itemsize

    def check(self, kernel: Any, grid: Any, args: Any, launch: Callable[[], None]) -> None:
        """Launch a kernel and compare what arrives.

        Args:
            kernel: The compiled one.
            grid: The number of programs.
            args: All arguments, constants and pointers too.
            launch: Does it.
        """
        function = kernel.src.fn
        given = dict(zip(function.arg_names, args, strict=True))
        kinds = kernel.src.signature.items()
        expected = [n for name, kind in kinds for n in self._numbers(kind, given[name])]
        sizes = _sizes(kernel.asm["ptx"])
        self._driver.fake_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        launch()
        found, rest = (ctypes.c_uint64 * 256)(), (ctypes.c_uint * 5)()
        self._driver.fake_get(found, rest)
        self.checked += 1
        self.log.append((kernel, grid, found[: len(expected)]))
        name, more = function.__name__, len(sizes) - len(expected)
        if found[: len(expected)] != expected or not 0 <= more <= _SCRATCH:
            self.problems.append(f"{name}: {found[: len(sizes)]} arrive for {expected}")
        threads = 32 * kernel.metadata.num_warps
        if rest[:4] != [*grid, threads]:
            self.problems.append(f"{name}: grid and threads {rest[:4]} for {grid}")
        if rest[4] != self.checked:
            self.problems.append(f"{name}: {rest[4]} launches, not {self.checked}")

    def compare(self, function: Any, *args: Any) -> None:
        """Call a function by its tape and without it, which must launch the same."""
        self.tapes += sum(each is not None for each in tape._tapes.values())
        given = {self.pointer(x) for x in _tensors(args)}
        self.log.clear()
        one = _tensors(function(*args))
        taped = list(self.log)
        self.log.clear()
        gpu_of, tape.gpu_of = tape.gpu_of, lambda x: None
        try:
            two = _tensors(function(*args))
        finally:
            tape.gpu_of = gpu_of
        # Memory that a call allocates is another one each time.
        names: dict[int, int] = {}

        def agree(a: int, b: int) -> bool:
            named = names.setdefault(a, b) == b and names.setdefault(~b, a) == a
            return a == b or (named and not {a, b} & given)

        same = len(taped) == len(self.log)
        for (kernel, grid, found), (other, there, expected) in zip(taped, self.log, strict=False):
            same = same and (kernel.hash, grid) == (other.hash, there)
            for a, b in zip(found, expected, strict=False):
                same = same and agree(a, b)
        for x, y in zip(one, two, strict=True):
            alike = (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
            same = same and alike and agree(self.pointer(x), self.pointer(y))
        if not same:
            self.problems.append(f"{function}: by its tape {taped}, without it {self.log}")

    def _numbers(self, kind: Any, value: Any) -> Iterator[int]:
        """The bits of what a kernel takes of an argument, as numbers without sign."""
        if isinstance(kind, (tuple, list)):
            for each, item in zip(kind, value, strict=True):
                yield from self._numbers(each, item)
        elif kind == "constexpr":
            return
        elif isinstance(value, Tensor):
            yield self.pointer(value)
        elif kind.startswith("*"):
            yield value
        elif isinstance(value, TensorDescriptor):
            base = value.base
            yield self.pointer(base) if isinstance(base, Tensor) else base.data_ptr()
            yield from (*value.shape, *value.strides)
        elif kind in ("fp32", "fp64"):
            to, of = ("I", "f") if kind == "fp32" else ("Q", "d")
            yield struct.unpack(to, struct.pack(of, value))[0]
        else:
            yield int(value) % 2 ** int(kind[1:])


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for each in x for y in _tensors(each)] if isinstance(x, (list, tuple)) else []


def _others(x: Any) -> Any:
    """The same with new tensors, one for each."""
    made: dict[int, Tensor] = {}

    def other(x: Any) -> Any:
        if isinstance(x, Tensor):
            return made.setdefault(
                id(x), torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            )
        return type(x)(map(other, x)) if isinstance(x, (list, tuple)) else x

    return other(x)


def _sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of a kernel; of a descriptor those that say where its tensor lies."""
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param (\.align \d+ )?\.(\w+)", entry[: entry.index(")")])
    return [8 if descriptor else _BYTES[kind] for descriptor, kind in found]


@contextmanager
def gpu() -> Iterator[None]:
    """A GPU of Hopper's kind that holds all tensors, and launches nothing."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.driver import driver as active

    driver, gpu_of = Driver(_CAPABILITY), tape.gpu_of
    driver.launcher_cls, driver.utils = CudaLauncher, CudaUtils()
    active.set_active(driver)
    tape.gpu_of = lambda x: _CAPABILITY
    tape._tapes.clear()
    try:
        yield
    finally:
        tape.gpu_of = gpu_of
        tape._tapes.clear()


def check(ops: Iterable[str], driver: ctypes.CDLL) -> _Launches:
    """Check the launches of ops, and those of their tapes."""
    from triton.compiler import CompiledKernel

    found, data_ptr, run_of = _Launches(driver), Tensor.data_ptr, CompiledKernel.run

    def run(kernel: Any) -> Callable[..., None]:
        launch = run_of.fget(kernel)

        def checked(x: int, y: int, z: int, *rest: Any) -> None:
            # The stream and five more come before the arguments.
            found.check(kernel, [x, y, z], rest[6:], partial(launch, x, y, z, *rest))

        return checked

    CompiledKernel.run = property(run)
    Tensor.data_ptr = lambda x: found.pointer(x)  # pyright: ignore
    try:
        for op in ops:
            function = function_of(op)
            for kind in KINDS:
                for _, args in calls(op, kind, _CAPABILITY):
                    with gpu(), precise(kind == "tf32"):
                        for _ in range(2):  # a tape is recorded at the second call
                            function(*args)
                        found.compare(function, *_others(args))
    finally:
        CompiledKernel.run, Tensor.data_ptr = run_of, data_ptr
    return found


_BATCHES = {128: (32, 20, 12), 1: (128, 100, 48), 16: (64, 40)}
"""Sizes of batches, by the number of positions."""


def kept(driver: ctypes.CDLL) -> list[str]:
    """Problems with what is kept of a call: no tensor is, and kernels for a smaller batch are."""
    from triton.runtime.jit import JITFunction

    compiled, compile_ = list[str](), JITFunction._do_compile

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        compiled.append(self.fn.__name__)
        return compile_(self, *args, **options)

    problems: list[str] = []
    driver.fake_expect(0, None)
    JITFunction._do_compile = counted
    try:
        with gpu():
            for positions, (first, *others) in _BATCHES.items():
                refs = [weakref.ref(x) for x in _call_of(first, positions)]
                if any(ref() is not None for ref in refs):
                    problems.append(f"{positions} positions: the tape keeps a tensor")
                compiled.clear()
                for batch in others:
                    _call_of(batch, positions)
                if compiled:
                    problems.append(f"{positions} positions: compiled anew {compiled}")
    finally:
        JITFunction._do_compile = compile_
    return problems


def _call_of(batch: int, positions: int) -> list[Tensor]:
    """The factors of a linear layer with a bias that is reduced several times."""
    x, g = (torch.empty(batch, positions, 768, dtype=torch.bfloat16) for _ in range(2))
    want = mask(("sq_norms", "weighted_sum"))
    linear, bias = function_of("linear_reduce"), function_of("affine_reduce")
    calls = [
        (linear, (x, g, None, None, want)),
        (bias, (g, None, None, None, None, None, want)),
    ]
    for _ in range(3):
        together(calls, [x.dtype] * 2, True)
    return [x, g]


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
    driver = load(Path(folder))
    found = check(options.ops, driver)
    found.problems += kept(driver)
    print(f"{found.checked} launches, {found.tapes} tapes")
    print("\n".join(found.problems[:20]))
    sys.exit(1 if found.problems or not found.checked else 0)


if __name__ == "__main__":
    main()
