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


def replayed(run: Callable[[], object]) -> Callable[[], object] | None:
    """The work of a run as a CUDA graph, which takes no time of the host; `None` without a GPU.

    `None` also if it cannot be captured, since it waits for the GPU.
    """
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()  # compiles, and fills what is remembered
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def host_seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds until the host has handed a run to the GPU; the least of several."""
    found = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
