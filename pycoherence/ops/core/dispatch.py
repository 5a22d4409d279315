"""Which implementation of an op runs, and why the others do not."""

import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pycoherence.ops.core.spec import OpSpec, tensors_of

BACKENDS = ("native", "triton", "reference")
"""In order of preference: what is native on CUDA is what Triton cannot do as well."""

NATIVE_NAMESPACE = "pycoherence_native"


class Backend(NamedTuple):
    """An implementation of an op.

    Attributes:
        name: Its backend.
        kernel: The function, which takes what the schema says.
    """

    name: str
    kernel: Callable[..., Any]


_PACKAGE = Path(__file__).parents[2]


def _checked(name: str | None, source: str = "pc.backend") -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    return name


# Not a context variable: autograd runs backward passes in threads of its own.
_forced = _checked(os.environ.get("PYCOHERENCE_BACKEND") or None, "PYCOHERENCE_BACKEND")


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every op on one backend while the block lasts, in all threads.

    The environment variable `PYCOHERENCE_BACKEND` does the same for a whole process.

    Args:
        name: `"reference"`, `"native"` or `"triton"`; `None` goes back to picking the fastest that
            accepts the arguments.

    Raises:
        ValueError: The name is none of these.
        RuntimeError: From an op inside the block that the backend cannot run; it names the reason.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(2, 1, 3), torch.ones(2, 1, 4)
        >>> with pc.backend("reference"):
        ...     pc.ops.linear_reduce(x, g).sq_norms
        tensor([12., 12.])
    """
    global _forced
    previous, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend that every op has to run on, if one was asked for."""
    return _forced


def build_record() -> dict[str, Any]:
    """The record of `setup.py` on what the installation built; empty if it left none."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _has_old_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


@functools.cache
def load_native(device: str) -> str | None:
    """Load the compiled kernels for a device type; returns why they cannot be used, or `None`."""
    if device not in ("cpu", "cuda"):
        return f"no native kernels exist for {device}"
    path = _PACKAGE / f"_C_{device}.abi3.so"
    if not path.exists():
        reason = build_record().get(device, {}).get("reason")
        return f"_C_{device} was not built: {reason or 'this is a source folder, not installed'}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and _has_old_gpu():
        return "the CUDA kernels are compiled for GPUs of compute capability 8.0 or more"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"_C_{device} does not load: {str(error).splitlines()[0]}"
    return None


@functools.cache
def _native_reason(op: str, device: str) -> str | None:
    missing = load_native(device)
    if missing is not None:
        return missing
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE_NAMESPACE}::{op}", key):
        return None
    return f"no native {device} kernel is written for {op}"


@functools.cache
def _triton_reason(op: str, device: str) -> str | None:
    if importlib.util.find_spec("pycoherence.triton_kernels") is None:
        return "the kernels are not here: this is a source folder, not installed"
    if importlib.util.find_spec(f"pycoherence.triton_kernels.{op}") is None:
        return f"no Triton kernel is written for {op}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None if device in ("cpu", "cuda") else f"Triton's interpreter runs no {device}"
    if device != "cuda":
        return (
            "Triton kernels run on CUDA devices (on the CPU if TRITON_INTERPRET=1, to debug them)"
        )
    if torch.version.hip is not None:
        return "Triton kernels are written for NVIDIA GPUs, and torch is built for AMD's"
    if _has_old_gpu():
        return "Triton kernels need a GPU of compute capability 8.0 or more"
    return None


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels: they then run anywhere, slowly."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _interpreter_reason(args: tuple[Any, ...]) -> str | None:
    if any(x.dtype == torch.bfloat16 for x in tensors_of(args)):
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def unavailable(op: str, name: str, device: str) -> str | None:
    """Why backend `name` has no implementation of `op` on `device`, or `None` if it has one."""
    if name == "native":
        return _native_reason(op, device)
    if name == "triton":
        return _triton_reason(op, device)
    return None


def explain(spec: OpSpec, device: str, args: tuple[Any, ...]) -> dict[str, str | None]:
    """For each backend, why it cannot run `spec` on these arguments, or `None` if it can."""
    return {name: _reason(spec, name, device, args) for name in BACKENDS}


def _reason(spec: OpSpec, name: str, device: str, args: tuple[Any, ...]) -> str | None:
    found = unavailable(spec.name, name, device)
    if found is None and name == "triton" and interpreted():
        found = _interpreter_reason(args)
    if found is None and name in spec.supports:
        return spec.supports[name](*args)
    return found


def fastest(spec: OpSpec, device: str, args: tuple[Any, ...]) -> Backend:
    """The first backend that accepts the arguments, whatever is forced.

    A kernel that leaves a part of its work to another op takes this one: the forced backend need
    not have that op too.
    """
    for name in fast_backends(spec.name, device):
        if name not in spec.supports or spec.supports[name](*args) is None:
            return Backend(name, kernel_of(spec.name, name, spec.helper))
    return Backend("reference", spec.reference)


def select(spec: OpSpec, device: str, args: tuple[Any, ...]) -> Backend:
    """The implementation to run: the forced backend's, or the fastest.

    Raises:
        RuntimeError: The forced backend cannot run the call; it names the reason.
    """
    if _forced is None:
        found = fastest(spec, device, args)
        if found.name == "reference" and device in ("cpu", "cuda"):
            missing = load_native(device)
            if missing is not None:
                _report_missing_library(device, missing)
        return found
    if _forced == "reference":
        return Backend("reference", spec.reference)
    reason = _reason(spec, _forced, device, args)
    if reason is None:
        return Backend(_forced, kernel_of(spec.name, _forced, spec.helper))
    raise RuntimeError(
        f"{spec.name}: backend {_forced!r} was asked for but cannot run this call: "
        f"{reason}. Use pc.backend(None) to let the library choose."
    )


@functools.cache
def fast_backends(op: str, device: str) -> list[str]:
    """The backends beside the reference that have the op on the device, the fastest first."""
    names = [name for name in BACKENDS[:-1] if unavailable(op, name, device) is None]
    # The interpreter is for debugging: it runs what was asked for by name.
    return [name for name in names if name != "triton" or not interpreted()]


@functools.cache
def _report_missing_library(device: str, reason: str) -> None:
    warnings.warn(
        f"pycoherence runs on its slower reference path on {device}: {reason}. "
        "`python -m pycoherence info` tells more; PYCOHERENCE_BACKEND=reference silences this.",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def kernel_of(op: str, name: str, helper: Callable[..., Any] | None) -> Callable[..., Any]:
    """The function of a backend that has the op; `helper` is as in `OpSpec`."""
    if name == "native":
        return getattr(getattr(torch.ops, NATIVE_NAMESPACE), op).default
    kernel = getattr(importlib.import_module(f"pycoherence.triton_kernels.{op}"), op)
    return kernel if helper is None else functools.partial(kernel, helper=helper)
