"""Robust aggregates as plain torch takes them, shared by the ops of order statistics.

Values are `[..., B]`: sorting and selecting along the last dimension is what torch does fastest.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Way
from pycoherence.ops.family.rules import aggregate

Formula = Callable[[Tensor, float], Tensor]

PART = 64 * 2**20
"""Bytes of materialised gradients at a time; more are no faster."""


def steps(size: int, bytes_each: float) -> Iterator[slice]:
    """Slices of things of `bytes_each`, each slice of no more than `PART` bytes."""
    step = max(1, int(PART // max(1, bytes_each)))
    return (slice(start, start + step) for start in range(0, size, step))


def middle(ordered: Tensor) -> Tensor:
    n = ordered.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def by_reference(rule: str) -> Formula:
    """The formula of the op's reference."""
    return lambda values, k: aggregate(values.flatten(0, -2).mT, rule, k, False).view(
        values.shape[:-1]
    )


def clamped(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return values.clamp(low.unsqueeze(-1), high.unsqueeze(-1)).mean(-1)


def sorted_winsorized(values: Tensor, k: float) -> Tensor:
    ordered = values.sort(-1).values
    return clamped(values, ordered[..., int(k)], ordered[..., -1 - int(k)])


def sorted_trimmed(values: Tensor, k: float) -> Tensor:
    return values.sort(-1).values[..., int(k) : values.shape[-1] - int(k)].mean(-1)


def extremes(values: Tensor, n: float) -> tuple[Tensor, Tensor]:
    """The `n` lowest and the `n` highest values."""
    low, high = (values.topk(int(n), dim=-1, largest=side).values for side in (False, True))
    return low, high


def topk_winsorized(values: Tensor, k: float) -> Tensor:
    low, high = extremes(values, k + 1)
    return clamped(values, low[..., -1], high[..., -1])


def topk_trimmed(values: Tensor, k: float) -> Tensor:
    low, high = extremes(values, k)
    kept = values.sum(-1) - low.sum(-1) - high.sum(-1)
    return kept / (values.shape[-1] - 2 * int(k))


def both_medians(values: Tensor, k: float) -> Tensor:
    """torch gives the lower one of two middle values."""
    return (values.median(-1).values - values.neg().median(-1).values) / 2


def median_of_means(values: Tensor, k: float) -> Tensor:
    means = [group.mean(-1) for group in values.tensor_split(int(k), dim=-1)]
    return middle(torch.stack(means, -1).sort(-1).values)


def sign_agreement(values: Tensor, k: float) -> Tensor:
    return values.mean(-1) * (values.sign().mean(-1).abs() >= k)


FORMULAS: dict[str, dict[str, Formula]] = {
    "sort": {
        "winsorized_mean": sorted_winsorized,
        "trimmed_mean": sorted_trimmed,
        "median": lambda values, k: middle(values.sort(-1).values),
        "phocas": by_reference("phocas"),
        "meamed": by_reference("meamed"),
    },
    "topk": {"winsorized_mean": topk_winsorized, "trimmed_mean": topk_trimmed},
    "torch.median": {
        "median": both_medians,
        "lower_median": lambda values, k: values.median(-1).values,
    },
    "quantile": {
        "median": lambda values, k: values.quantile(0.5, -1, interpolation="midpoint"),
        "lower_median": lambda values, k: values.quantile(0.5, -1, interpolation="lower"),
    },
    "materialised": {"median_of_means": median_of_means, "sign_agreement": sign_agreement},
}


def ways(pieces: Callable[..., Iterator[Tensor]], dim: int = 0) -> dict[str, Way]:
    """All formulas on materialised gradients.

    Args:
        pieces: From the arguments that come before the rule, the values of all coordinates
            `[..., B]`, in pieces of `PART` bytes.
        dim: Along which the aggregates of the pieces follow each other.
    """

    def way(formulas: dict[str, Formula]) -> Way:
        def run(wanted: frozenset[str], rule: str, k: float, drop: bool, **head) -> Outputs:
            found = [formulas[rule](values, k) for values in pieces(**head)]
            return {name: torch.cat(found, dim) for name in wanted}

        def workspace(wanted: frozenset[str], rule: str, **arguments) -> float | None:
            return 8.0 * PART if rule in formulas else None

        return Way(run, workspace)

    return {name: way(formulas) for name, formulas in FORMULAS.items()}


def group_gradients(gradient: Callable[..., Tensor]) -> Way:
    """The median of means from ordinary gradients, one for each group of examples.

    Args:
        gradient: From a slice of the batch and the arguments before the rule, the sum of its
            gradients.
    """

    def run(wanted: frozenset[str], g: Tensor, rule: str, k: float, drop: bool, **head) -> Outputs:
        means = []
        for group in torch.arange(len(g)).tensor_split(int(k)):
            part = slice(int(group[0]), int(group[-1]) + 1)
            means.append(gradient(part, g=g, **head) / len(group))
        found = middle(torch.stack(means).sort(0).values.movedim(0, -1))
        return dict.fromkeys(wanted, found)

    def workspace(wanted: frozenset[str], rule: str, k: float, **arguments) -> float | None:
        return 8.0 * PART if rule == "median_of_means" else None

    return Way(run, workspace)
