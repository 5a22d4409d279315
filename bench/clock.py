"""How long something takes."""

import time
from collections.abc import Callable

import torch


def seconds_of(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one run, as the mean of `repeats`; where there is a GPU, by its clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats
