"""Measures statistics in training: each as a multiple of a plain forward and backward pass.

    python -m bench training [--device cuda] [--models MLP ...] [--cases SqNorms ...] [--rounds N]
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
from collections.abc import Callable, Mapping, Sequence

import torch

from bench.shared import environment, options, results
from bench.shared.results import Row
from bench.shared.tasks import ON, TASKS, Task, make
from bench.shared.timing import seconds_of
from bench.training import memory
from bench.training.cases import OURS, PLAIN, Case, Step
from bench.training.rivals import RIVALS
from bench.training.truth import LIMITS, Truth

CASES = {case.name: case for case in (PLAIN, *OURS, *RIVALS)}

SLOW = 10
"""Cases this many times slower than plain run in every fourth round only."""

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""Those of parameters and inputs that are usual there."""


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.peak:
        model, case = given.peak
        print(memory.growth(CASES[case].prepare(make(model, given.batch))))
        return 0
    out = given.out or results.file_for("training", given.device, "json")
    out.parent.mkdir(parents=True, exist_ok=True)
    given.dtype = getattr(torch, given.dtype or DTYPES[given.device])
    limit, found = LIMITS[given.dtype], dict[str, Row]()
    result = environment.setting(given.device) | {
        "dtype": str(given.dtype).removeprefix("torch."),
        "rounds": given.rounds,
        "limit": limit,
        "models": found,
    }
    for name in given.models or ON[given.device]:
        found[name] = _model(name, given)
        out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [
        f"{name}: {row['name']}"
        for name, model in found.items()
        for row in model["cases"]
        if row["kind"] == "ours" and row["error"] is not None and row["error"] > limit
    ]
    print("\n".join([*(f"FAILED {one}" for one in wrong), str(out)]))
    return 1 if wrong else 0


def _model(name: str, given: argparse.Namespace) -> Row:
    batch = 8 if given.quick else given.batch
    new = functools.partial(make, name, batch, given.device, given.dtype)
    task = new()
    size = sum(p.numel() for p in task.model.parameters())
    print(f"{name}: {size} parameters, batch of {len(task.y)}", flush=True)
    truth = Truth.of(task)
    cases = [CASES[case] for case in given.cases or CASES]
    rows, steps = check(cases, new, truth, LIMITS[given.dtype])
    del truth
    seconds = interleave(steps, given.rounds)
    plain = seconds[PLAIN.name]
    for row in rows:
        if row["name"] not in seconds:
            continue
        row["seconds"] = seconds[row["name"]]
        row["ratio"] = row["seconds"] / plain
        if given.device == "cuda":
            row["peak_bytes"] = memory.growth_on_gpu(steps[row["name"]])
        elif not given.quick:
            row["peak_bytes"] = memory.in_new_process(name, row["name"], given.threads, len(task.y))
        print(f"    {row['name']:<24} {row['ratio']:7.2f}x", flush=True)
    return {"parameters": size, "batch": len(task.y), "plain_seconds": plain, "cases": rows}


def check(
    cases: Sequence[Case], new: Callable[[], Task], truth: Truth, limit: float
) -> tuple[list[Row], dict[str, Step]]:
    """Run each case once.

    Args:
        cases: To try.
        new: Makes the task.
        truth: True outputs of the task.
        limit: Allowed error.

    Returns:
        A row for each, and the steps of those that gave what is true.
    """
    rows, steps = [], {}
    for case in cases:
        step, error, reason = _try(case, new, truth, limit)
        rows.append({"name": case.name, "kind": case.kind, "error": error, "reason": reason})
        if reason is None:
            steps[case.name] = step
        else:
            print(f"    {case.name:<24} left out: {reason}", flush=True)
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
        # Others say what they cannot do with all kinds of exceptions.
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
    parser = options.measuring("training", __doc__, device="cpu", kept=True)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of parameters and inputs; default: float32, on a GPU bfloat16",
    )
    parser.add_argument("--models", nargs="+", choices=TASKS, help="default: those for the device")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--batch", type=int, metavar="B", help="default: each model's own")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peak",
        nargs=2,
        metavar=("MODEL", "CASE"),
        help="print by how many bytes the case grows this process; for the column of memory",
    )
    return parser
