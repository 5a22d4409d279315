"""Plain torch for `dense_gram`. `B2 = 0` is the Gram matrix of one batch with itself."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Shape, Source, Way, gram, shapes, widen

SHAPES = shapes(
    "B B2 P",
    (256, 0, 1024),
    (1024, 0, 10),
    (16, 0, 256),
    (64, 0, 1_000_000),
    (512, 0, 4096),
    (100, 300, 5000),
)
QUICK = shapes("B B2 P", (3, 0, 5), (2, 4, 3))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    b2 = shape["B2"]
    b = random.normal(b2, shape["P"]) if b2 else None
    return {"a": random.normal(shape["B"], shape["P"]), "b": b}


def product(wanted: frozenset[str], a: Tensor, b: Tensor | None) -> Outputs:
    a = widen(a)
    return {"gram": gram(a, a if b is None else widen(b))}


def einsum(wanted: frozenset[str], a: Tensor, b: Tensor | None) -> Outputs:
    a = widen(a)
    return {"gram": torch.einsum("ip,jp->ij", a, a if b is None else widen(b))}


def _nothing(wanted: frozenset[str], **arguments: Any) -> float:
    return 0.0


WAYS = {"product": Way(product, _nothing), "einsum": Way(einsum, _nothing)}
