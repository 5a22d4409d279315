"""Prints what is installed, what was built, and which backend runs each op."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import pycoherence
from pycoherence.extras import PLOTS, STUDIES
from pycoherence.ops import specs
from pycoherence.ops.core.dispatch import (
    build_record,
    explain,
    fastest,
    forced_backend,
    interpreted,
    load_native,
)
from pycoherence.ops.core.spec import OpSpec

PACKAGES = ("torch", "triton", "numpy")

# By package, what it serves, and the command that adds it.
EXTRAS = {
    "triton": ("GPU kernels", "pip install triton"),
    "matplotlib": ("plots", PLOTS),
    "sklearn": ("demo and studies", STUDIES),
}


def report() -> str:
    """The text of `python -m pycoherence info`."""
    return "\n".join([*_versions(), "", *_hardware(), "", *_libraries(), *_missing(), "", *_ops()])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Iterator[str]:
    yield f"pycoherence  {pycoherence.__version__} in {os.path.dirname(pycoherence.__file__)}"
    for package in PACKAGES:
        yield f"{package:<12} {_version(package)}"
    yield f"{'python':<12} {platform.python_version()} on {platform.platform()}"


def _hardware() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"CPU          {capability}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "GPU          none that torch sees"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"GPU          {torch.cuda.get_device_name(index)}, sm_{major}{minor}"


def _libraries() -> Iterator[str]:
    record = build_record()
    built_by = f"{record.get('compiler') or 'no compiler'}, torch {record.get('torch')}"
    yield f"build        {record['mode']}, {built_by}" if record else "build        none here"
    for device in ("cpu", "cuda"):
        built = "built, but " if record.get(device, {}).get("built") else ""
        reason = load_native(device)
        yield f"_C_{device:<9} {'loaded' if reason is None else built + reason}"


def _missing() -> Iterator[str]:
    """Commands that add what this machine lacks and could use."""
    root, record = Path(__file__).parents[1], build_record()
    folder = f"-e {root}" if (root / "setup.py").exists() else ". in the source folder"
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        if not record.get(device, {}).get("built"):
            install = "pip install --no-deps --force-reinstall --no-build-isolation"
            yield f"to add       {device} kernels: PYCOHERENCE_BUILD={device} {install} {folder}"
    for package, (use, command) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield f"to add       {use}: {command}"


def _ops() -> Iterator[str]:
    forced = forced_backend()
    if forced is not None:
        yield f"backend      {forced}, forced by PYCOHERENCE_BACKEND"
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        yield f"ops on {device}, float32:"
        for spec in specs.values():
            yield from _op(spec, device, forced)


def _op(spec: OpSpec, device: str, forced: str | None) -> Iterator[str]:
    sample = next(iter(spec.samples(device, torch.float32)))
    found = explain(spec, device, sample)
    runs = forced or fastest(spec, device, sample).name
    refused = "" if found[runs] is None else ", which cannot run it: calls raise"
    yield f"  {spec.name:<18} {runs}{refused}"
    for name, reason in found.items():
        if forced is None and name == "triton" and interpreted():
            reason = reason or "interpreted kernels run only if asked for by name"
        if reason is not None:
            yield f"  {'':<18}   not {name}: {reason}"
