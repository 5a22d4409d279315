"""Plain torch for `dense_order`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.ops.formulas import orders
from bench.ops.ways import Shape, Source, shapes, widen

SHAPES = shapes("B P", (128, 1024), (128, 10), (32, 100_000), (1024, 4096))
QUICK = shapes("B P", (6, 5), (9, 1))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    return {"rows": random.normal(shape["B"], shape["P"])}


def pieces(rows: Tensor) -> Iterator[Tensor]:
    """`[p, B]` of some columns at a time."""
    for part in orders.steps(rows.shape[1], 4.0 * len(rows)):
        yield widen(rows[:, part]).T.contiguous()


WAYS = orders.ways(pieces)
