"""Plain torch for `embedding_gram`. `B2 = 0` is the Gram matrix of one batch with itself."""

from typing import Any

from torch import Tensor

from bench.ops.formulas import tables
from bench.ops.ways import Outputs, Shape, Source, Way, gram, shapes

SHAPES = shapes(
    "B B2 T V D padding_idx",
    (16, 0, 128, 1024, 256, -1),
    (16, 0, 128, 128, 256, -1),
    (32, 0, 128, 10000, 128, 0),
    (256, 0, 16, 1000, 64, -1),
    (1024, 0, 1, 512, 64, -1),
    (8, 24, 256, 4096, 128, -1),
)
QUICK = shapes("B B2 T V D padding_idx", (3, 0, 5, 4, 3, 1), (4, 2, 3, 6, 5, -1))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    t, v, d = shape["T"], shape["V"], shape["D"]
    made: dict[str, Any] = {"num_embeddings": v, "padding_idx": shape["padding_idx"]}
    for suffix, batch in {"1": shape["B"], "2": shape["B2"]}.items():
        made[f"g{suffix}"] = random.normal(batch, t, d) if batch else None
        made[f"ids{suffix}"] = random.integers(v, batch, t) if batch else None
    return made


def pair(
    ids1: Tensor,
    g1: Tensor,
    ids2: Tensor | None,
    g2: Tensor | None,
    padding_idx: int,
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both batches, which may be the same, without what falls on the padding row."""
    first = ids1, tables.unpadded(ids1, g1, padding_idx)
    if ids2 is None or g2 is None:
        return *first, *first
    return *first, ids2, tables.unpadded(ids2, g2, padding_idx)


def same_rows(wanted: frozenset[str], **arguments: Any) -> Outputs:
    ids1, g1, ids2, g2 = pair(**arguments)
    flat = (factor.flatten(0, 1) for factor in (ids1, g1, ids2, g2))
    products = tables.same_row_products(*flat)
    return {"gram": products.view(*ids1.shape, *ids2.shape).sum((1, 3))}


def materialised(wanted: frozenset[str], num_embeddings: int, **arguments: Any) -> Outputs:
    ids1, g1, ids2, g2 = pair(**arguments)
    rows = tables.gradients(ids1, g1, num_embeddings).flatten(1)
    other = rows if ids2 is ids1 else tables.gradients(ids2, g2, num_embeddings).flatten(1)
    return {"gram": gram(rows, other)}


def _same(wanted: frozenset[str], ids1: Tensor, ids2: Tensor | None, **arguments: Any) -> float:
    return 5.0 * ids1.numel() * (ids1 if ids2 is None else ids2).numel()


def _rows(
    wanted: frozenset[str],
    num_embeddings: int,
    g1: Tensor,
    ids2: Tensor | None,
    **arguments: Any,
) -> float:
    batches = len(g1) + (0 if ids2 is None else len(ids2))
    return 4.0 * batches * num_embeddings * g1.shape[2]


WAYS = {"same rows": Way(same_rows, _same), "materialised": Way(materialised, _rows)}
