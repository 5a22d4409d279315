"""Numbers for a logger, pooled over the batches of a step."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pycoherence import metrics
from pycoherence.robust import Decision, Report
from pycoherence.statistics import Coherence


def of_norms(sq_norms: Sequence[Tensor]) -> dict[str, float]:
    """The mean and quantiles of the norms of all examples; NaN if there are none.

    Args:
        sq_norms: Squared norms `[B]` of each batch.
    """
    norms = torch.cat([x.double().cpu() for x in sq_norms]).sqrt()
    if not norms.numel() or norms.isnan().any():
        return dict.fromkeys(["norm/mean", "norm/median", "norm/q90", "norm/max"], math.nan)
    median, q90, most = norms.sort().values[quantile_ranks(norms.numel())].tolist()
    return {
        "norm/mean": norms.mean().item(),
        "norm/median": median,
        "norm/q90": q90,
        "norm/max": most,
    }


def of_coherences(parts: Sequence[Coherence]) -> dict[str, float]:
    """m-coherence, signal, noise and their ratio, pooled over batches at the same weights.

    Args:
        parts: The coherence of each batch.
    """
    s, q = sum(c.sum_sq_norm for c in parts), sum(c.total_sq_norm for c in parts)
    n = sum(c.n for c in parts)
    # The two sums of a batch of one are the same number, but for rounding.
    several = [c for c in parts if c.n > 1]
    pairs = sum(c.n * (c.n - 1) for c in several)
    signal = ratio(sum(c.sum_sq_norm - c.total_sq_norm for c in several), pairs)
    spread = sum(c.total_sq_norm - c.sum_sq_norm / c.n for c in several)
    variance = ratio(spread, sum(c.n - 1 for c in several))
    return {
        "coherence/m": ratio(s, q),
        "coherence/unbiased_alpha": ratio(signal, ratio(q, n)),
        "gradient/sq_norm": signal,
        "gradient/variance": variance,
        "noise_scale": ratio(variance, signal),
    }


def of_grams(grams: Sequence[Tensor]) -> dict[str, float]:
    """The mean cosine of two different examples of a batch; NaN if there are none.

    Args:
        grams: Dot products `[B, B]` of each batch.
    """
    total, pairs = 0.0, 0
    for gram in grams:
        cosines = metrics.cosines(gram.double().cpu())
        total += (cosines.sum() - cosines.diagonal().sum()).item()
        pairs += len(gram) * (len(gram) - 1)
    return {"cosine/mean": ratio(total, pairs)}


def of_dots(dots: Sequence[Tensor]) -> dict[str, float]:
    """The mean of the dot products with the direction, and the share of those below zero.

    Args:
        dots: Dot products `[B]` of each batch.
    """
    every = torch.cat([x.double().cpu() for x in dots])
    n = every.numel()
    return {
        "dots/mean": ratio(every.sum().item(), n),
        "dots/negative": ratio((every < 0).sum().item(), n),
    }


def of_reports(reports: Sequence[Report]) -> dict[str, float]:
    """The means over batches of what a rule reports; over parameters too, if each decides alone.

    Empty batches count if there are no others.

    Args:
        reports: The report on each batch.
    """
    told = [one for one in reports if one.batch_size] or reports
    found = {"clipped": list[float](), "kept": list[float](), "iterations": list[float]()}
    for report in told:
        decisions = report.by_parameter.values() if report.network is None else [report.network]
        for name, values in found.items():
            mine = [x for x in (_number(one, name) for one in decisions) if x is not None]
            if mine:
                values.append(sum(mine) / len(mine))
    return {f"rule/{name}": sum(x) / len(x) for name, x in found.items() if x}


def ratio(a: float, b: float) -> float:
    """`a / b` as of floats in torch: infinite or NaN if `b` is zero."""
    if b:
        return a / b
    return math.nan if not a or math.isnan(a) else math.copysign(math.inf, a)


def _number(decision: Decision, name: str) -> float | None:
    values: Mapping[str, float | None] = vars(decision)
    return values[name]


def quantile_ranks(n: int) -> list[int]:
    """Places of the median (the lower one), of the 0.9 quantile, and of the last of `n` values."""
    return [(n - 1) // 2, -(-9 * (n - 1) // 10), n - 1]
