"""Plain torch for `identity`."""

from typing import Any

from bench.ops.ways import Shape, Source, reference, shapes

SHAPES = shapes("rows columns", (1, 8), (1024, 1024), (4096, 4096))
QUICK = shapes("rows columns", (3, 5))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    return {"x": random.normal(shape["rows"], shape["columns"])}


WAYS = {"reference": reference("identity")}
