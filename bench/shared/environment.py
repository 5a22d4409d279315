"""The setting of a measurement: machine, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = """
torch triton pycoherence opacus backpack-for-pytorch torchjd transformers accelerate lightning
""".split()


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its cores and vector instructions; with `"cuda"` the GPU too."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Those of Python and of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def setting(device: str = "cpu") -> dict[str, Any]:
    """All that a result should tell of where it was measured."""
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit, with `-dirty` if files have changed since; `None` outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def slug(device: str = "cpu") -> str:
    """The machine as part of a file name."""
    here = machine(device)
    words = here.get("gpu") or f"{here['cpu']} {here['cores']} cores"
    plain = re.sub(r"\((r|tm)\)|processor|cpu|@", " ", words.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.processor() or platform.machine()
