"""Each rule as its paper has it, on gradients that are all there, in float64.

Rules over coordinates take one coordinate at a time: sorted lists, of which fractions are made to
add or compare distances. The others take rows `[B, P]`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

import pycoherence as pc
from support.backends import backends_of
from support.oracle import joined

Numbers = Sequence[float | Fraction]

# Whole numbers are summed exactly; what is left is the rounding of a few operations.
ROUNDING = {
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float32: 1e-6,
    torch.float64: 1e-15,
}


def mean(values: Numbers) -> Fraction:
    return sum(map(Fraction, values), Fraction()) / len(values)


def median(values: Numbers) -> Fraction:
    ordered, n = sorted(values), len(values)
    return mean(ordered[(n - 1) // 2 : n // 2 + 1])


def trimmed(values: Numbers, k: int) -> Numbers:
    return sorted(values)[k : len(values) - k]


def nearest(values: Numbers, centre: Fraction, n: int) -> Numbers:
    """The lower one first of two that are equally far."""
    return sorted(values, key=lambda v: (abs(Fraction(v) - centre), v))[:n]


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
    return values if abs(signs) / n >= k else [0.0]


def aggregate(values: Sequence[float], rule: str, k: float, drop: bool) -> tuple[float, float]:
    """The value of a coordinate, and the size of the numbers that it is made of."""
    if not values:
        return 0.0, 0.0
    if not drop and not all(map(math.isfinite, values)):
        return math.nan, 0.0
    if rule == "median_of_means":
        parts = [[v for v in group if math.isfinite(v)] for group in groups(values, int(k))]
        means = [mean(part) for part in parts if part]
        size = max((abs(v) for part in parts for v in part), default=0.0)
        return (float(median(means)), size) if means else (math.nan, 0.0)
    found = used([v for v in values if math.isfinite(v)], rule, k)
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


def coordinates(rule: str, k: float = 0) -> Callable[[Tensor], Tensor]:
    """The rule of this name on rows `[B, P]`."""

    def of(rows: Tensor) -> Tensor:
        found = [aggregate(column, rule, k, drop=False)[0] for column in rows.T.tolist()]
        return torch.tensor(found, dtype=torch.float64)

    return of


def krum_scores(rows: list[Tensor], f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        others = sorted((row - r).square().sum().item() for j, r in enumerate(rows) if j != i)
        scores.append(sum(others[: max(1, len(rows) - f - 2)]))
    return scores


def krum(rows: Tensor, f: int, m: int = 1) -> Tensor:
    scores = krum_scores(list(rows), f)
    best = sorted(range(len(rows)), key=lambda i: scores[i])[:m]
    return rows[best].mean(0)


def bulyan(rows: Tensor, f: int) -> Tensor:
    left, chosen = list(rows), []
    theta = len(rows) - 2 * f
    while len(chosen) < theta:
        scores = krum_scores(left, f)
        chosen.append(left.pop(scores.index(min(scores))))
    return coordinates("meamed", 2 * f)(torch.stack(chosen))


def _first_least(n: int, size: int, value: Callable[[list[int]], float]) -> list[int]:
    """The first of all sets whose value is least, but for rounding."""
    sets = [list(some) for some in itertools.combinations(range(n), size)]
    values = [value(some) for some in sets]
    least = min(values)
    return next(s for s, v in zip(sets, values, strict=True) if v <= least * (1 + 1e-9) + 1e-12)


def mda(rows: Tensor, f: int) -> Tensor:
    distances = [[(a - b).norm().item() for b in rows] for a in rows]

    def diameter(some: list[int]) -> float:
        return max(distances[i][j] for i in some for j in some)

    return rows[_first_least(len(rows), len(rows) - f, diameter)].mean(0)


def smea(rows: Tensor, f: int) -> Tensor:
    return rows[smea_set(rows, f)].mean(0)


def smea_set(rows: Tensor, f: int) -> list[int]:
    def spread(some: list[int]) -> float:
        centred = rows[some] - rows[some].mean(0)
        return torch.linalg.svdvals(centred).max().item() ** 2

    return _first_least(len(rows), len(rows) - f, spread)


def monna(rows: Tensor, f: int, trusted: int = 0) -> Tensor:
    return rows[_nearest_to(rows, trusted)[: len(rows) - f]].mean(0)


def _nearest_to(rows: Tensor, i: int) -> list[int]:
    # Whole numbers squared are exact, so that ties are ties.
    distances = [-1.0 if j == i else (row - rows[i]).square().sum() for j, row in enumerate(rows)]
    return sorted(range(len(rows)), key=lambda j: distances[j])


def nearest_mixed(rows: Tensor, f: int) -> Tensor:
    size = len(rows) - f
    return torch.stack([rows[_nearest_to(rows, i)[:size]].mean(0) for i in range(len(rows))])


def arc(rows: Tensor, f: int) -> Tensor:
    n = len(rows)
    norms = sorted(row.norm().item() for row in rows)
    limit = norms[n - 1 - 2 * f * (n - f) // n]
    return torch.stack([row * min(1, limit / max(row.norm().item(), 1e-300)) for row in rows])


def buckets(rows: Tensor, order: Sequence[int], size: int) -> Tensor:
    parts = [list(order[i : i + size]) for i in range(0, len(order), size)]
    return torch.stack([rows[part].mean(0) for part in parts])


def geometric_median(rows: Tensor, iterations: int, nu: float, tolerance: float) -> Tensor:
    z = rows.mean(0)
    total = (rows - z).norm(dim=1).sum()
    for _ in range(iterations):
        beta = 1 / (rows - z).norm(dim=1).clamp(min=nu)
        z = (beta[:, None] * rows).sum(0) / beta.sum()
        before, total = total, (rows - z).norm(dim=1).sum()
        if abs(before - total) <= tolerance * before:
            break
    return z


def centered_clip(rows: Tensor, centre: Tensor, radius: float, iterations: int) -> Tensor:
    for _ in range(iterations):
        moves = rows - centre
        for move in moves:
            move *= min(1, radius / max(move.norm().item(), 1e-300))
        centre = centre + moves.mean(0)
    return centre


def norm_clip(rows: Tensor, max_norm: float) -> Tensor:
    return torch.stack([g / max(1, g.norm().item() / max_norm) for g in rows]).mean(0)


def auto_clip(rows: Tensor, max_norm: float, gamma: float) -> Tensor:
    return torch.stack([g * max_norm / (g.norm() + gamma) for g in rows]).mean(0)


def gaf(rows: Tensor, threshold: float) -> Tensor:
    total, agreed = rows[0], 0
    for g in rows[1:]:
        if 1 - torch.nn.functional.cosine_similarity(total, g, dim=0) <= threshold:
            total, agreed = (total + g) / 2, agreed + 1
    return total if agreed else torch.zeros_like(total)


def by_parameter(
    gradients: dict[str, Tensor], rule: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Apply a rule to each parameter alone."""
    return {n: rule(g.flatten(1)).view(g.shape[1:]) for n, g in gradients.items()}


def over_network(
    gradients: dict[str, Tensor], rule: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Apply a rule to all parameters together."""
    whole = rule(joined(gradients))
    parts = whole.split([g[0].numel() for g in gradients.values()])
    return {n: x.view(g.shape[1:]) for x, (n, g) in zip(parts, gradients.items(), strict=True)}
