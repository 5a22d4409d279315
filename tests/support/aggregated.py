"""Robust aggregates by the book: one coordinate at a time, sorted lists, fractions."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

import pycoherence as pc
from support.backends import backends_of

Numbers = list[Fraction]

# Whole numbers are summed exactly; what is left is the rounding of a few operations.
ROUNDING = {
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float32: 1e-6,
    torch.float64: 1e-15,
}


def mean(values: Numbers) -> Fraction:
    return sum(values, Fraction()) / len(values)


def median(values: Numbers) -> Fraction:
    ordered, n = sorted(values), len(values)
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


def trimmed(values: Numbers, k: int) -> Numbers:
    return sorted(values)[k : len(values) - k]


def nearest(values: Numbers, centre: Fraction, n: int) -> Numbers:
    """The lower one first of two that are equally far."""
    return sorted(values, key=lambda v: (abs(v - centre), v))[:n]


def groups(values: Sequence[float], n: int) -> list[Sequence[float]]:
    """Neighbours, in groups whose sizes differ by one at most, larger ones first."""
    found, start = [], 0
    for i in range(n):
        stop = start + len(values) // n + (i < len(values) % n)
        found.append(values[start:stop])
        start = stop
    return found


def used(values: Numbers, rule: str, k: float) -> Numbers | None:
    """The numbers whose mean a rule gives; `None` if there are too few values for it."""
    n, whole = len(values), int(k)
    if rule in ("winsorized_mean", "trimmed_mean", "phocas") and n <= 2 * k:
        return None
    if n == 0 or (rule == "meamed" and n <= k):
        return None
    if rule == "winsorized_mean":
        inner = trimmed(values, whole)
        return [min(max(v, inner[0]), inner[-1]) for v in values]
    if rule == "trimmed_mean":
        return trimmed(values, whole)
    if rule == "median":
        return [median(values)]
    if rule == "lower_median":
        return [sorted(values)[(n - 1) // 2]]
    if rule == "phocas":
        return nearest(values, mean(trimmed(values, whole)), n - whole)
    if rule == "meamed":
        return nearest(values, median(values), n - whole)
    assert rule == "sign_agreement"
    signs = sum((v > 0) - (v < 0) for v in values)
    return values if abs(signs) / n >= k else [Fraction()]


def aggregate(values: Sequence[float], rule: str, k: float, drop: bool) -> tuple[float, float]:
    """The value of a coordinate, and the size of the numbers that it is made of."""
    if not values:
        return 0.0, 0.0
    if not drop and not all(map(math.isfinite, values)):
        return math.nan, 0.0
    if rule == "median_of_means":
        parts = [[v for v in group if math.isfinite(v)] for group in groups(values, int(k))]
        means = [mean([Fraction(v) for v in part]) for part in parts if part]
        size = max((abs(v) for part in parts for v in part), default=0.0)
        return (float(median(means)), size) if means else (math.nan, 0.0)
    found = used([Fraction(v) for v in values if math.isfinite(v)], rule, k)
    if found is None:
        return math.nan, 0.0
    return float(mean(found)), float(max(map(abs, found)))


def assert_aggregated(
    op: str,
    call: Callable[[], Tensor],
    rows: Tensor,
    rule: str,
    k: float,
    drop: bool,
    tolerance: float,
) -> None:
    """On every backend that has the op, the call gives the aggregate of `rows`.

    Args:
        op: Name of the op.
        call: Runs it.
        rows: Gradients `[B, *shape]`, as the op sees them.
        rule: Its name; so are `k` and `drop` the arguments of the call.
        tolerance: Allowed error in each coordinate, over the largest number that it is made of.
    """
    columns = rows.double().reshape(len(rows), math.prod(rows.shape[1:])).mT.tolist()
    truth = [aggregate(column, rule, k, drop) for column in columns]
    for backend in backends_of(op):
        with pc.backend(backend):
            out = call()
        assert out.shape == rows.shape[1:], backend
        for ours, (value, size), column in zip(out.flatten().tolist(), truth, columns, strict=True):
            same = math.isnan(ours) and math.isnan(value)
            assert same or abs(ours - value) <= tolerance * size, (backend, ours, value, column)
