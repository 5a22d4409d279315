"""Plain torch for `row_sq_norms`: one matrix after the other, `L` of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Shape, Source, Way, reference, shapes

SHAPES = shapes("L B N", (20, 256, 1024), (100, 64, 512), (10, 2048, 10))
QUICK = shapes("L B N", (3, 2, 5), (1, 4, 3))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    return {"rows": [random.normal(shape["B"], shape["N"]) for _ in range(shape["L"])]}


def norms(wanted: frozenset[str], rows: Sequence[Tensor]) -> Outputs:
    found = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in rows]
    return {"row_sq_norms": torch.stack(found).square()}


def _workspace(wanted: frozenset[str], rows: Sequence[Tensor]) -> float:
    return 8.0 * max(x.numel() for x in rows)


WAYS = {"reference": reference("row_sq_norms"), "norms": Way(norms, _workspace)}
