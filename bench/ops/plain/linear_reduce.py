"""Plain torch for `linear_reduce`."""

from typing import Any

from torch import Tensor

from bench.ops.formulas import factored
from bench.ops.ways import (
    ONE_BY_ONE,
    Outputs,
    Shape,
    Source,
    Way,
    reduce_one_by_one,
    reduce_rows,
    rows_workspace,
    shapes,
    widen,
)

SHAPES = shapes(
    "B T I O",
    (1024, 1, 8, 8),
    (1024, 1, 128, 128),
    (256, 1, 512, 512),
    (16, 1, 784, 1024),
    (256, 1, 1024, 10),
    (64, 1, 8, 4096),
    (64, 1, 4096, 8),
    (1, 1, 4096, 4096),
    (64, 2, 256, 256),
    (256, 8, 64, 64),
    (32, 32, 256, 256),
    (7, 33, 131, 70),
    (1024, 16, 64, 64),
    (16, 128, 256, 768),
    (16, 128, 256, 1024),
    (16, 128, 1024, 256),
    (1, 64, 4096, 4096),
    (128, 256, 8, 64),
    (8, 512, 512, 512),
    (4, 2048, 256, 256),
    (1, 2048, 1024, 1024),
    (64, 2048, 8, 8),
)
QUICK = shapes("B T I O", (3, 1, 8, 5), (2, 4, 3, 6), (2, 9, 16, 2))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    b, t = shape["B"], shape["T"]
    return {"x": random.normal(b, t, shape["I"]), "g": random.normal(b, t, shape["O"])}


def materialised(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> Outputs:
    return reduce_rows(wanted, factored.gradients(widen(x), widen(g)), **tail)


def partly_materialised(
    wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None
) -> Outputs:
    x, g = widen(x), widen(g)
    out = factored.direct(wanted, x, g, **tail)
    return out | reduce_rows(wanted - factored.DIRECT, factored.gradients(x, g), None, None)


def ghost(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> Outputs:
    x, g = widen(x), widen(g)
    out = factored.direct(wanted, x, g, **tail)
    if "sq_norms" in wanted:
        out["sq_norms"] = factored.ghost_norms(x, g)
    if "gram" in wanted:
        out["gram"] = factored.ghost_gram(x, g, x, g)
    return out


def single(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> Outputs:
    return factored.single(wanted, widen(x), widen(g), **tail)


def one_by_one(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> Outputs:
    x, g = widen(x), widen(g)
    return reduce_one_by_one(wanted, lambda b: g[b].mT @ x[b], len(x), **tail)


def _rows(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> float:
    return rows_workspace(wanted, len(x), x.shape[2] * g.shape[2])


def _partly(wanted: frozenset[str], **arguments: Any) -> float | None:
    mixed = wanted & factored.DIRECT and wanted - factored.DIRECT
    return _rows(wanted, **arguments) if mixed else None


def _ghost(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> float | None:
    if not wanted <= factored.DIRECT | {"sq_norms", "gram"}:
        return None
    pairs = (len(x) if "gram" in wanted else 1) if wanted - factored.DIRECT else 0
    return 8.0 * len(x) * x.shape[1] ** 2 * pairs + 4.0 * g.numel()


def _single(wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None) -> float | None:
    return 4.0 * (x.numel() + g.numel()) if x.shape[1] == 1 else None


def _one_by_one(
    wanted: frozenset[str], x: Tensor, g: Tensor, **tail: Tensor | None
) -> float | None:
    return rows_workspace(wanted, 1, x.shape[2] * g.shape[2]) if wanted <= ONE_BY_ONE else None


WAYS = {
    "materialised": Way(materialised, _rows),
    "partly materialised": Way(partly_materialised, _partly),
    "ghost": Way(ghost, _ghost),
    "outer products": Way(single, _single),
    "one by one": Way(one_by_one, _one_by_one),
}
