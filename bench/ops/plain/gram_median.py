"""Plain torch for `gram_median`: it checks for convergence after each iteration."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Shape, Source, Way, shapes

SHAPES = shapes("B P", (16, 100), (256, 1000), (1024, 1000))
QUICK = shapes("B P", (3, 2), (9, 5))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    rows = random.normal(shape["B"], shape["P"])
    kept = torch.ones(shape["B"], dtype=torch.bool, device=rows.device)
    return {
        "gram": rows @ rows.mT,
        "kept": kept,
        "nu": 1e-6,
        "tolerance": 1e-6,
        "iterations": 100,
    }


def weiszfeld(
    wanted: frozenset[str],
    gram: Tensor,
    kept: Tensor,
    nu: float,
    tolerance: float,
    iterations: int,
) -> Outputs:
    gram, dtype = gram.double(), torch.promote_types(gram.dtype, torch.float32)
    weights = torch.full_like(gram[0], 1 / len(gram))
    distances = _distances(gram, weights)
    for _ in range(iterations):
        beta = 1 / distances.clamp(min=nu)
        weights = beta / beta.sum()
        before, distances = distances.sum(), _distances(gram, weights)
        if (before - distances.sum()).abs() <= tolerance * before:
            break
    return {"gram_median": weights.to(dtype)}


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    products = gram @ weights
    return (gram.diagonal() - 2 * products + weights @ products).clamp(min=0).sqrt()


def _workspace(wanted: frozenset[str], gram: Tensor, **others: Any) -> float:
    return 0.0 if gram.dtype == torch.float64 else 8.0 * gram.numel()


WAYS = {"weiszfeld": Way(weiszfeld, _workspace)}
