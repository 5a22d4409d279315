"""Plain torch for `embedding_order`."""

from collections.abc import Iterator

from torch import Tensor

from bench.ops.formulas import orders, tables
from bench.ops.plain import embedding_reduce
from bench.ops.ways import reference, shapes

SHAPES = shapes(
    "B T V D padding_idx",
    (16, 128, 1024, 256, -1),
    (8, 512, 32000, 128, -1),
    (256, 32, 1000, 64, 0),
    (128, 1, 4096, 128, -1),
)
QUICK = shapes("B T V D padding_idx", (6, 5, 4, 3, 1), (7, 1, 6, 5, -1))
inputs = embedding_reduce.inputs


def pieces(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Iterator[Tensor]:
    """`[V, d, B]` of some columns of the table at a time."""
    g = tables.unpadded(ids, g, padding_idx)
    for part in orders.steps(g.shape[2], 4.0 * len(g) * num_embeddings):
        yield tables.gradients(ids, g[..., part], num_embeddings).movedim(0, -1).contiguous()


def gradient(part: slice, ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    unpadded = tables.unpadded(ids[part], g[part], padding_idx)
    return tables.weighted_sum(ids[part], unpadded, num_embeddings, None)


WAYS = {
    **orders.ways(pieces, dim=1),
    "gradients of groups": orders.group_gradients(gradient),
    "reference": reference("embedding_order"),  # it leaves out the rows that no example touches
}
