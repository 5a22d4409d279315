"""Measures statistics in training: each as a multiple of a plain forward and backward pass.

    python bench/training.py [--device cuda] [--models MLP ...] [--cases SqNorms ...] [--rounds N]
                             [--batch B] [--quick] [--out FILE]

Every case gets a copy of the model of its own and is checked against autograd, one example at a
time. Then all cases take turns, in another order in every round; the figures are
medians. Peak memory is that of a fresh process for each case; on a GPU it is that of live tensors.
"""

import argparse
import functools
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import environment
import memory
import torch
from clock import seconds_of
from measured import OURS, PLAIN, Case, Step
from networks import ON, TASKS, Task, make
from rivals import RIVALS
from truth import LIMITS, Truth

CASES = {case.name: case for case in (PLAIN, *OURS, *RIVALS)}

SLOW = 10
"""Cases this many times slower than plain run in every fourth round only."""

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Of parameters and inputs: what is usual there."""

DTYPES_HELP = "of parameters and inputs; default: float32, on a GPU bfloat16"

Row = dict[str, Any]


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        model, case = options.peak
        print(memory.growth(CASES[case].prepare(make(model, options.batch))))
        return 0
    device = options.device
    options.out = options.out or environment.RESULTS / f"training-{environment.slug(device)}.json"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.dtype = getattr(torch, options.dtype or DTYPES[device])
    limit, found = LIMITS[options.dtype], dict[str, Row]()
    result = environment.setting(device) | {
        "dtype": str(options.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "limit": limit,
        "models": found,
    }
    for name in options.models or ON[device]:
        found[name] = _model(name, options)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [
        f"{name}: {row['name']}"
        for name, model in found.items()
        for row in model["cases"]
        if row["kind"] == "ours" and row["error"] is not None and row["error"] > limit
    ]
    print("\n".join([*(f"FAILED {one}" for one in wrong), str(options.out)]))
    return 1 if wrong else 0


def _model(name: str, options: argparse.Namespace) -> Row:
    batch = 8 if options.quick else options.batch
    new = functools.partial(make, name, batch, options.device, options.dtype)
    task = new()
    size = sum(p.numel() for p in task.model.parameters())
    print(f"{name}: {size} parameters, batch of {len(task.y)}", flush=True)
    truth = Truth.of(task)
    cases = [CASES[case] for case in options.cases or CASES]
    rows, steps = check(cases, new, truth, LIMITS[options.dtype])
    del truth
    seconds = interleave(steps, options.rounds)
    plain = seconds[PLAIN.name]
    for row in rows:
        if row["name"] not in seconds:
            continue
        row["seconds"] = seconds[row["name"]]
        row["ratio"] = row["seconds"] / plain
        if options.device == "cuda":
            row["peak_bytes"] = memory.growth_on_gpu(steps[row["name"]])
        elif not options.quick:
            row["peak_bytes"] = memory.in_new_process(
                name, row["name"], options.threads, len(task.y)
            )
        print(f"    {row['name']:<24} {row['ratio']:7.2f}x", flush=True)
    return {"parameters": size, "batch": len(task.y), "plain_seconds": plain, "cases": rows}


def check(
    cases: Sequence[Case], new: Callable[[], Task], truth: Truth, limit: float
) -> tuple[list[Row], dict[str, Step]]:
    """Run each case once.

    Args:
        cases: To try.
        new: Makes the task.
        truth: Of the task.
        limit: Allowed error.

    Returns:
        A row for each, and the steps of those that gave what is true.
    """
    rows, steps = [], {}
    for case in cases:
        row: Row = {"name": case.name, "kind": case.kind, "error": None, "reason": None}
        rows.append(row)
        if case.missing():
            row["reason"] = f"pycoherence has no {', '.join(case.missing())}"
        else:
            step, row["error"], row["reason"] = _try(case, new, truth, limit)
            if row["reason"] is None:
                steps[case.name] = step
        if row["reason"]:
            print(f"    {case.name:<24} left out: {row['reason']}", flush=True)
    return rows, steps


def _try(
    case: Case, new: Callable[[], Task], truth: Truth, limit: float
) -> tuple[Step | None, float | None, str | None]:
    """The step of a case, its error, and why it does not count."""
    try:
        step = case.prepare(new())
        error = truth.error(step())
    except Exception as problem:
        if case.kind != "rival":
            raise
        # What others cannot do, they say with all kinds of exceptions.
        return None, None, f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
    if error > limit:
        return None, error, f"wrong: error {error:.1e}"
    return step, error, None


def interleave(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all of them taking turns."""
    first = {name: seconds_of(step) for name, step in steps.items()}
    limit = SLOW * first[PLAIN.name]
    samples = {name: list[float]() for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            if first[name] <= limit or turn % 4 == 0:
                samples[name].append(seconds_of(steps[name]))
        gc.collect()
    gc.enable()
    return {name: statistics.median(found) for name, found in samples.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=ON, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=DTYPES_HELP)
    parser.add_argument("--models", nargs="+", choices=TASKS, help="default: those for the device")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--batch", type=int, metavar="B", help="default: each model's own")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny batches, no memory: to try it")
    parser.add_argument("--out", type=Path, help="default: a file for this machine in results/")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "CASE"), help=memory.HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
