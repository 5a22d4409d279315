"""Plain torch for `embedding_reduce`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.ops.formulas import factored, tables
from bench.ops.ways import Outputs, Shape, Source, Way, reduce_rows, rows_workspace, shapes

SHAPES = shapes(
    "B T V D padding_idx",
    (16, 128, 1024, 256, -1),
    (16, 128, 128, 256, -1),
    (8, 512, 32000, 128, -1),
    (1, 2048, 32000, 512, -1),
    (256, 32, 1000, 64, 0),
    (1024, 8, 100, 16, -1),
    (1024, 1, 4096, 128, -1),
    (8, 2048, 64, 32, -1),
    (16, 128, 10000, 512, 0),
)
QUICK = shapes("B T V D padding_idx", (3, 5, 4, 3, 1), (4, 1, 6, 5, -1))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    b, t, v = shape["B"], shape["T"], shape["V"]
    g = random.normal(b, t, shape["D"])
    ids = random.integers(v, b, t)
    return {"ids": ids, "g": g, "num_embeddings": v, "padding_idx": shape["padding_idx"]}


def direct(
    wanted: frozenset[str],
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    coef: Tensor | None,
    direction: Tensor | None,
) -> Outputs:
    out = Outputs()
    if "dots" in wanted and direction is not None:
        out["dots"] = tables.dots(ids, g, direction)
    if wanted & {"weighted_sum", "sum_dots"}:
        out["weighted_sum"] = tables.weighted_sum(ids, g, num_embeddings, coef)
    if "sum_dots" in wanted:
        out["sum_dots"] = tables.dots(ids, g, out["weighted_sum"])
    return out


def without_padding(run: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The same with output gradients that are zero where the row gets none."""

    def padded(
        wanted: frozenset[str], ids: Tensor, g: Tensor, padding_idx: int, **arguments: Any
    ) -> Outputs:
        return run(wanted, ids, tables.unpadded(ids, g, padding_idx), **arguments)

    return padded


def materialised(
    wanted: frozenset[str], ids: Tensor, g: Tensor, num_embeddings: int, **tail: Tensor | None
) -> Outputs:
    return reduce_rows(wanted, tables.gradients(ids, g, num_embeddings), **tail)


def touched_rows(
    wanted: frozenset[str], ids: Tensor, g: Tensor, num_embeddings: int, **tail: Tensor | None
) -> Outputs:
    out = direct(wanted, ids, g, num_embeddings, **tail)
    if wanted - factored.DIRECT:
        examples, row_ids, rows = tables.pairs(ids, g, num_embeddings)
        if "sq_norms" in wanted:
            norms = rows.square().sum(1)
            out["sq_norms"] = norms.new_zeros(len(g)).index_add_(0, examples, norms)
        for name, values in (("second_moment", Tensor.square), ("sign_sum", Tensor.sign)):
            if name in wanted:
                table = rows.new_zeros(num_embeddings, g.shape[2])
                out[name] = table.index_add_(0, row_ids, values(rows))
    if "gram" in wanted:
        out["gram"] = _gram(ids, g)
    return out


def same_rows(
    wanted: frozenset[str], ids: Tensor, g: Tensor, num_embeddings: int, **tail: Tensor | None
) -> Outputs:
    out = direct(wanted, ids, g, num_embeddings, **tail)
    if "sq_norms" in wanted:
        out["sq_norms"] = tables.same_row_products(ids, g, ids, g).sum((1, 2))
    if "gram" in wanted:
        out["gram"] = _gram(ids, g)
    return out


def _gram(ids: Tensor, g: Tensor) -> Tensor:
    b, t, _ = g.shape
    flat_ids, flat = ids.flatten(), g.flatten(0, 1)
    return tables.same_row_products(flat_ids, flat, flat_ids, flat).view(b, t, b, t).sum((1, 3))


def _rows(wanted: frozenset[str], g: Tensor, num_embeddings: int, **arguments: Any) -> float:
    return rows_workspace(wanted, len(g), num_embeddings * g.shape[2])


def _touched(wanted: frozenset[str], g: Tensor, **arguments: Any) -> float:
    pairs = 5.0 * (len(g) * g.shape[1]) ** 2 if "gram" in wanted else 0.0
    return 8.0 * g.numel() + pairs


def _same(wanted: frozenset[str], g: Tensor, **arguments: Any) -> float | None:
    if not wanted & {"sq_norms", "gram"} or not wanted <= factored.DIRECT | {"sq_norms", "gram"}:
        return None
    return 5.0 * len(g) * g.shape[1] ** 2 * (len(g) if "gram" in wanted else 1)


WAYS = {
    "materialised": Way(without_padding(materialised), _rows),
    "touched rows": Way(without_padding(touched_rows), _touched),
    "same rows": Way(without_padding(same_rows), _same),
}
