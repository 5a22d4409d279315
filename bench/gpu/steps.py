"""Divides a training step on a GPU into the time of the host and that of the GPU.

    python -m bench steps [--model GPT-2] [--device cuda] [--quick] [--out FILE]

A step with `SqNorms` and a plain one are timed as they run; until the host has handed them over;
and as CUDA graphs, which take no time of the host. The norms of the graph must be those of the
step. Results are JSON lines.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.shared import options, results
from bench.shared.results import Row
from bench.shared.tasks import TASKS, Task, make, plain, with_norms
from bench.shared.timing import host_seconds_of, replayed, seconds_of

TURNS = 15
LIMIT = 1e-2
"""How far the norms of a graph may be from those of a step, in half precision."""


def graph_error(step: Callable[[], Tensor | None]) -> float | None:
    """How far what a graph of a step gives is from the step, of the largest number."""
    expected = step()
    found: list[Tensor] = []

    def run() -> None:
        out = step()
        found.append(torch.zeros(1) if out is None else out)

    replay = replayed(run)
    if replay is None or expected is None:
        return None
    replay()
    torch.cuda.synchronize()
    return ((found[-1] - expected).abs().max() / expected.abs().max()).item()


def measure(task: Task) -> list[Row]:
    """A row for each way."""
    each = {"plain": partial(plain, task), "SqNorms": partial(with_norms, task)}
    error = graph_error(each["SqNorms"])
    ways = {(name, "eager"): step for name, step in each.items()}
    for name, step in each.items():
        graph = replayed(step)
        if graph is not None:
            ways[name, "graph"] = graph
    for run in ways.values():
        run()
    times = [[seconds_of(run) for run in ways.values()] for _ in range(TURNS)]
    rows = []
    medians = dict(zip(ways, map(statistics.median, zip(*times, strict=True)), strict=True))
    for (name, way), seconds in medians.items():
        row = {"step": name, "way": way, "seconds": seconds}
        row["ratio"] = seconds / medians["plain", way]
        if way == "eager":
            row["host_seconds"] = host_seconds_of(each[name])
        elif name == "SqNorms":
            row |= {"error": error, "check": "ok" if error is None or error <= LIMIT else "failed"}
        rows.append(row)
    if ("SqNorms", "graph") not in ways and torch.cuda.is_available():
        rows.append({"step": "SqNorms", "way": "graph", "check": "cannot be captured"})
    return rows


def main(argv: Sequence[str]) -> int:
    parser = options.measuring("steps", __doc__, device="cuda")
    parser.add_argument("--model", choices=TASKS, default="GPT-2")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args(argv)
    name, batch = ("GPT", 2) if given.quick else (given.model, given.batch)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    rows = measure(make(name, batch, given.device, dtype))
    for row in results.written(({"model": name} | row for row in rows), given.out, given.device):
        print(*(f"{key} {value}" for key, value in row.items()))
    return 1 if any(row.get("check", "ok") != "ok" for row in rows) else 0
