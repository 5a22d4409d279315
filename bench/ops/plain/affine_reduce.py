"""Plain torch for `affine_reduce`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops.ways import Outputs, Shape, Source, Way, reduce_rows, rows_workspace, shapes, widen

SHAPES = shapes(
    "B T C kind",
    (256, 1, 1024, "shift"),
    (16, 128, 256, "shift"),
    (16, 128, 1024, "shift"),
    (64, 1024, 32, "shift"),
    (1024, 1, 8, "shift"),
    (1, 2048, 4096, "shift"),
    (16, 128, 256, "norm"),
    (4, 2048, 768, "norm"),
    (1024, 1, 512, "norm"),
    (128, 64, 64, "scale"),
)
QUICK = shapes("B T C kind", (3, 4, 5, "shift"), (3, 1, 5, "norm"), (2, 7, 3, "scale"))


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    b, t, c = shape["B"], shape["T"], shape["C"]
    found: dict[str, Any] = {"g": random.normal(b, t, c), "x": None, "mean": None, "rstd": None}
    if shape["kind"] != "shift":
        found["x"] = random.normal(b, t, c)
    if shape["kind"] == "norm":
        found["mean"] = random.statistic(b, t, 1)
        found["rstd"] = random.statistic(b, t, 1).abs()
    return found


def _normalised(x: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    x = widen(x)
    x = x if mean is None else x - mean
    return x if rstd is None else x * rstd


def product_and_sum(g: Tensor, x: Tensor | None) -> Tensor:
    return (g if x is None else g * x).sum(1)


def einsum(g: Tensor, x: Tensor | None) -> Tensor:
    if x is None:
        return g.new_ones(len(g), 1, g.shape[1]).bmm(g)[:, 0]
    return torch.einsum("btc,btc->bc", g, x)


def from_rows(rows_of: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., Outputs]:
    """The reductions of the gradients `[B, C]`."""

    def run(
        wanted: frozenset[str],
        g: Tensor,
        x: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        **tail: Tensor | None,
    ) -> Outputs:
        scaled = None if x is None else _normalised(x, mean, rstd)
        return reduce_rows(wanted, rows_of(widen(g), scaled), **tail)

    return run


def _workspace(wanted: frozenset[str], g: Tensor, x: Tensor | None, **arguments: Any) -> float:
    full = 0 if x is None else 8.0 * g.numel()
    return full + rows_workspace(wanted, len(g), g.shape[2])


WAYS = {
    "product and sum": Way(from_rows(product_and_sum), _workspace),
    "einsum": Way(from_rows(einsum), _workspace),
}
