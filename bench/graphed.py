"""Divides a training step on a GPU into the time of the host and that of the GPU.

    python bench/graphed.py [--model GPT-2] [--device cuda] [--quick] [--out FILE]

A step with `SqNorms` and a plain one are timed as they run; until the host has handed them over;
and as CUDA graphs, which take no time of the host. The norms of the graph must be those of the
step. Results are JSON lines.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import torch
from clock import host_seconds_of, replayed, seconds_of
from networks import TASKS, Task, make
from torch import Tensor

import pycoherence as pc

TURNS = 15
LIMIT = 1e-2
"""How far the norms of a graph may be from those of a step, in half precision."""


def steps(task: Task) -> dict[str, Callable[[], Tensor | None]]:
    """A plain step, and one that gives the squared norms."""

    def plain() -> None:
        task.model.zero_grad()
        task.loss().backward()

    def with_norms() -> Tensor:
        task.model.zero_grad()
        with pc.collect(task.model, pc.SqNorms()) as record:
            task.loss().backward()
        return record.sq_norms

    return {"plain": plain, "SqNorms": with_norms}


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


def measure(task: Task) -> list[dict[str, Any]]:
    """A row for each way."""
    each = steps(task)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=TASKS, default="GPT-2")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model, to try it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = "GPT" if options.quick else options.model
    batch = 2 if options.quick else options.batch
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rows = measure(make(name, batch, options.device, dtype))
    setting = environment.setting(options.device)
    if options.out:
        lines = [json.dumps({"model": name} | row | setting) + "\n" for row in rows]
        options.out.write_text("".join(lines))
    for row in rows:
        print(name, *(f"{key} {value}" for key, value in row.items()))
    return 1 if any(row.get("check", "ok") != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
