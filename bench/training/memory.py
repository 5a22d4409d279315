"""Peak memory of a step, in a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.shared.environment import ROOT

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def growth(step: Callable[[], object]) -> int:
    """By how many bytes three steps raise the peak of this process; -1 where the system is mute.

    Model, batch and libraries are in memory before.
    """
    if not _CLEAR.exists():
        return -1
    # Not getrusage: its maximum is inherited from the process that started this one.
    _CLEAR.write_text("5")
    before = _read("VmRSS")
    for _ in range(3):
        step()
    return _read("VmHWM") - before


def growth_on_gpu(step: Callable[[], object]) -> int:
    """By how many bytes of live tensors a step raises the peak of the GPU's memory."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def in_new_process(model: str, case: str, threads: int, batch: int) -> int | None:
    """`growth` of a case."""
    options = ["--threads", str(threads), "--batch", str(batch), "--peak", model, case]
    command = [sys.executable, "-m", "bench", "training", *options]
    # Large blocks go back to the system when freed, so that the peak is that of live tensors and
    # does not depend on how the allocator cuts its heap.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, check=True
    )
    found = int(done.stdout.splitlines()[-1])
    return None if found < 0 else found


def _read(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found, field
    return int(found.group(1)) * 1024
