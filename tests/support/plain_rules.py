"""Each rule as its paper has it, on gradients that are all there: rows `[B, P]`, in float64."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def winsorized(rows: Tensor, k: int) -> Tensor:
    ordered = rows.sort(0).values
    return rows.clamp(ordered[k], ordered[len(rows) - 1 - k]).mean(0)


def trimmed_mean(rows: Tensor, k: int) -> Tensor:
    return rows.sort(0).values[k : len(rows) - k].mean(0)


def median(rows: Tensor, lower: bool = False) -> Tensor:
    return rows.median(0).values if lower else torch.from_numpy(np.median(rows.numpy(), axis=0))


def median_of_means(rows: Tensor, groups: int) -> Tensor:
    means = [part.mean(0) for part in map(torch.from_numpy, np.array_split(rows.numpy(), groups))]
    return median(torch.stack(means))


def sign_agreement(rows: Tensor, threshold: float) -> Tensor:
    return rows.mean(0) * (rows.sign().mean(0).abs() >= threshold)


def nearest(rows: Tensor, centre: Tensor, count: int) -> Tensor:
    """At each coordinate the mean of so many values nearest to the centre."""
    found = []
    for column, c in zip(rows.T.tolist(), centre.tolist(), strict=True):
        found.append(math.fsum(sorted(column, key=lambda v: (abs(v - c), v))[:count]) / count)
    return torch.tensor(found, dtype=torch.float64)


def phocas(rows: Tensor, k: int) -> Tensor:
    return nearest(rows, trimmed_mean(rows, k), len(rows) - k)


def meamed(rows: Tensor, k: int) -> Tensor:
    return nearest(rows, median(rows), len(rows) - k)


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
    return nearest(torch.stack(chosen), median(torch.stack(chosen)), theta - 2 * f)


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
    whole = rule(torch.cat([g.flatten(1) for g in gradients.values()], 1))
    parts = whole.split([g[0].numel() for g in gradients.values()])
    return {n: x.view(g.shape[1:]) for x, (n, g) in zip(parts, gradients.items(), strict=True)}
