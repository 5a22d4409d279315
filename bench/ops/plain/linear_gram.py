"""Plain torch for `linear_gram`. `B2 = 0` is the Gram matrix of one batch with itself."""

from typing import Any

from torch import Tensor

from bench.ops.formulas import factored
from bench.ops.ways import Outputs, Shape, Source, Way, gram, shapes, widen

SHAPES = shapes(
    "B B2 T I O",
    (64, 0, 1, 512, 512),
    (256, 0, 1, 1024, 10),
    (1024, 0, 1, 64, 64),
    (2, 0, 1, 4096, 2048),
    (64, 128, 1, 256, 512),
    (16, 0, 128, 256, 768),
    (16, 0, 128, 1024, 256),
    (64, 0, 16, 128, 128),
    (128, 0, 64, 8, 64),
    (4, 0, 2048, 256, 256),
    (2, 0, 64, 4096, 4096),
    (7, 5, 33, 131, 70),
    (8, 32, 64, 256, 256),
)
QUICK = shapes("B B2 T I O", (3, 0, 1, 8, 5), (2, 4, 3, 6, 5), (3, 0, 9, 4, 2))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    t, i, o = shape["T"], shape["I"], shape["O"]
    batches = {"1": shape["B"], "2": shape["B2"]}
    made = {"x2": None, "g2": None}
    for suffix, batch in batches.items():
        if batch:
            made[f"x{suffix}"] = random.normal(batch, t, i)
            made[f"g{suffix}"] = random.normal(batch, t, o)
    return made


def pair(
    x1: Tensor, g1: Tensor, x2: Tensor | None, g2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both batches, which may be the same."""
    x1, g1 = widen(x1), widen(g1)
    return (x1, g1, x1 if x2 is None else widen(x2), g1 if g2 is None else widen(g2))


def ghost(wanted: frozenset[str], **arguments: Any) -> Outputs:
    return {"gram": factored.ghost_gram(*pair(**arguments))}


def materialised(wanted: frozenset[str], **arguments: Any) -> Outputs:
    x1, g1, x2, g2 = pair(**arguments)
    rows = factored.gradients(x1, g1).flatten(1)
    other = rows if x2 is x1 else factored.gradients(x2, g2).flatten(1)
    return {"gram": gram(rows, other)}


def single(wanted: frozenset[str], **arguments: Any) -> Outputs:
    x1, g1, x2, g2 = (factor[:, 0] for factor in pair(**arguments))
    return {"gram": (x1 @ x2.T).mul_(g1 @ g2.T)}


def _ghost(wanted: frozenset[str], **arguments: Any) -> float:
    x1, _, x2, _ = pair(**arguments)
    return 8.0 * len(x1) * x1.shape[1] * len(x2) * x2.shape[1]


def _rows(wanted: frozenset[str], **arguments: Any) -> float:
    x1, g1, x2, _ = pair(**arguments)
    batches = len(x1) + (len(x2) if x2 is not x1 else 0)
    return 4.0 * batches * x1.shape[2] * g1.shape[2]


def _single(wanted: frozenset[str], x1: Tensor, **arguments: Any) -> float | None:
    return 0.0 if x1.shape[1] == 1 else None


WAYS = {
    "ghost": Way(ghost, _ghost),
    "materialised": Way(materialised, _rows),
    "outer products": Way(single, _single),
}
