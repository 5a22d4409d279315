"""Plain torch for `gram_filter`: example by example, each asked for its dot product."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Shape, Source, Way, shapes

SHAPES = shapes("B P", (16, 10), (256, 10), (1024, 10))
QUICK = shapes("B P", (3, 2), (9, 3))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    rows = random.normal(shape["B"], shape["P"])
    kept = torch.ones(shape["B"], dtype=torch.bool, device=rows.device)
    return {"gram": rows @ rows.mT, "kept": kept, "threshold": 0.9}


def one_by_one(wanted: frozenset[str], gram: Tensor, kept: Tensor, threshold: float) -> Outputs:
    gram, dtype = gram.double(), torch.promote_types(gram.dtype, torch.float32)
    norms, weights = gram.diagonal().sqrt().tolist(), torch.zeros_like(gram[0])
    weights[0] = 1
    products, sq_norm, agree = gram[0], norms[0] ** 2, 0
    for b in range(1, len(gram)):
        product, scale = products[b].item(), sq_norm**0.5 * norms[b]
        if 1 - (product / scale if scale else 0.0) <= threshold:
            weights /= 2
            weights[b] = 0.5
            products = (products + gram[b]) / 2
            sq_norm = (sq_norm + 2 * product + norms[b] ** 2) / 4
            agree += 1
    return {"gram_filter": (weights if agree else torch.zeros_like(weights)).to(dtype)}


def _workspace(wanted: frozenset[str], gram: Tensor, **others: Any) -> float:
    return 0.0 if gram.dtype == torch.float64 else 8.0 * gram.numel()


WAYS = {"one by one": Way(one_by_one, _workspace)}
