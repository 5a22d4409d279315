"""Checks every candidate for a case against the truth in float64, then times those that passed."""

import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pycoherence as pc
from bench.ops.cases import Case
from bench.ops.ways import Outputs
from bench.shared.results import Row
from bench.shared.timing import seconds_of
from pycoherence.ops.core.dispatch import BACKENDS, explain
from pycoherence.ops.core.spec import tensors_of

WORKSPACE = 2 * 2**30
"""Plain torch may take this many bytes beside inputs and outputs."""

HOPELESS = 10
"""Candidates whose first run is this many times slower than the fastest are not run again."""

SHORT = 0.1
"""Seconds that a run may take to be repeated all the same."""

CHOOSING = ("sign_agreement", "phocas", "meamed")
"""Rules that leave values out by a comparison that rounding may decide; in few coordinates."""


@dataclass(frozen=True)
class Candidate:
    """Something that computes a case.

    Attributes:
        kind: `"backend"` or `"plain"`.
        name: Name of the backend, or of the way.
        run: Gives the wanted outputs.
        context: The context it runs in; entering it is not timed.
    """

    kind: str
    name: str
    run: Callable[[], Any]
    named: Callable[[Any], Outputs]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


Times = dict[Candidate, tuple[float, int]]
"""Median seconds of a run, and the number of runs."""


def candidates(case: Case) -> tuple[list[Candidate], dict[str, str]]:
    """Backends and ways that can compute a case; for the ways that cannot, why."""
    args = case.positional()
    device = next(value.device.type for value in tensors_of(args))
    op = getattr(torch.ops.pycoherence, case.spec.name).default
    found = [
        Candidate("backend", name, lambda: op(*args), case.named, lambda n=name: pc.backend(n))
        for name in BACKENDS
        if explain(case.spec, device, tuple(args))[name] is None
    ]
    skipped, wanted, plain = dict[str, str](), frozenset(case.wanted), case.plain_arguments()
    for name, way in case.ways.items():
        workspace = way.workspace(wanted, **plain)
        if workspace is None:
            continue
        if workspace > WORKSPACE:
            skipped[name] = f"needs {workspace / 2**30:.1f} GiB"
            continue
        run = (lambda w: lambda: w.run(wanted, **plain))(way)
        found.append(Candidate("plain", name, run, lambda outputs: outputs))
    return found, skipped


def measure(case: Case, seconds: float) -> list[Row]:
    """One row for each backend, and for each candidate that is wrong.

    Args:
        case: The case to compute.
        seconds: How long to repeat; every candidate runs three times at least, unless it is
            hopeless.
    """
    found, skipped = candidates(case)
    checked = {c: check(case, c) for c in found}
    errors = {c: error for c, (error, _) in checked.items()}
    limit = tolerance(case)
    right = {c: first for c, (error, first) in checked.items() if error <= limit}
    times = interleave(right, seconds)
    plain = {c.name: times[c][0] for c in right if c.kind == "plain"}
    rows = []
    for c in found:
        passed = c in times
        if c.kind == "plain" and passed:
            continue
        row: Row = {
            "op": case.spec.name,
            "shape": dict(case.shape),
            "want": list(case.wanted),
            "dtype": str(_dtype(case)).removeprefix("torch."),
            c.kind: c.name,
            "check": "ok" if passed else "failed",
            "error": errors[c],
        }
        if passed:
            row |= {"seconds": times[c][0], "runs": times[c][1]} | _compare(times[c][0], plain)
        rows.append(row | ({"skipped": skipped} if skipped else {}))
    return rows


def _compare(seconds: float, plain: Mapping[str, float]) -> Row:
    """The ratio is above 1 where plain torch is faster."""
    if not plain:
        return {"plain_seconds": {}, "fastest": None, "ratio": None}
    fastest = min(plain, key=lambda name: plain[name])
    return {"plain_seconds": plain, "fastest": fastest, "ratio": seconds / plain[fastest]}


def interleave(first: Mapping[Candidate, float], seconds: float) -> Times:
    """Run candidates in turns until time is up.

    Args:
        first: Seconds of the first run of each candidate. Hopeless ones get one more if that is
            short, for it may have been held up by others on the machine, and that is all.
        seconds: How long.
    """
    if not first:
        return {}
    fastest = min(first.values())
    first = {
        c: min(once, sample(c, 1)) if HOPELESS * fastest < once < SHORT else once
        for c, once in first.items()
    }
    times: Times = {c: (once, 1) for c, once in first.items()}
    warm = {c: sample(c, 1) for c in first if first[c] <= HOPELESS * fastest}
    # Runs too short for the clock are taken together.
    repeats = max(1, min(100, int(min(1e-3, seconds / 100) / min(warm.values()))))
    turns = max(3, min(31, int(seconds / (repeats * sum(warm.values())))))
    samples = {c: list[float]() for c in warm}
    for _ in range(turns):
        for c in samples:
            samples[c].append(sample(c, repeats))
    return times | {c: (statistics.median(s), turns * repeats) for c, s in samples.items()}


def sample(candidate: Candidate, repeats: int) -> float:
    """Seconds of one run, as the mean of `repeats`."""
    with candidate.context():
        return seconds_of(candidate.run, repeats)


def tolerance(case: Case) -> float:
    """Allowed error over the largest value; of what rounding may tip over, on average."""
    return 1e-11 if _dtype(case) == torch.float64 else 1e-5


def _dtype(case: Case) -> torch.dtype:
    values = case.arguments.values()
    return next(v.dtype for v in tensors_of(values) if v.is_floating_point())


def check(case: Case, candidate: Candidate) -> tuple[float, float]:
    """The worst error of a first run, and the seconds that it took."""
    truth = case.truth()
    outputs = list[Any]()
    with candidate.context():
        seconds = seconds_of(lambda: outputs.append(candidate.run()))
    ours, batch = candidate.named(outputs[0]), case.shape.get("B", 1)
    return max(_error(name, ours[name], truth[name], batch) for name in case.wanted), seconds


def _error(name: str, ours: Tensor, truth: Tensor, batch: int) -> float:
    if ours.shape != truth.shape:
        return math.inf
    difference = (ours.double() - truth).abs()
    if not difference.isfinite().all():
        return math.inf
    if name == "sign_sum":  # sums near zero may come out on either side, and few do
        return difference.sum().item() / (2 * batch * truth.numel())
    scale = truth.abs().max().item()
    worst = (difference.mean() if name.startswith(CHOOSING) else difference.max()).item()
    return worst / scale if scale else worst
