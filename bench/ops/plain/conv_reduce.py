"""Plain torch for `conv_reduce`."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.ops.formulas import factored, patches
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
    patches.NAMES,
    (64, 3, 32, 32, 3, 1, 1, 1, 1),
    (64, 32, 64, 32, 3, 2, 1, 1, 1),
    (64, 64, 128, 16, 3, 2, 1, 1, 1),
    (64, 128, 128, 8, 3, 1, 1, 1, 1),
    (16, 64, 64, 16, 3, 1, 2, 2, 1),
    (256, 16, 16, 8, 3, 1, 1, 1, 1),
    (1, 64, 64, 56, 3, 1, 1, 1, 1),
    (16, 256, 64, 14, 1, 1, 0, 1, 1),
    (16, 64, 256, 14, 1, 1, 0, 1, 1),
    (64, 512, 512, 1, 1, 1, 0, 1, 1),
    (16, 128, 256, 14, 1, 2, 0, 1, 1),
    (8, 3, 64, 64, 7, 2, 3, 1, 1),
    (4, 32, 32, 28, 7, 1, 3, 1, 1),
    (16, 64, 64, 28, 3, 1, 1, 1, 64),
    (16, 96, 96, 14, 7, 1, 3, 1, 96),
    (32, 128, 128, 14, 3, 2, 1, 1, 128),
    (16, 64, 64, 14, 3, 1, 1, 1, 4),
    (1024, 8, 8, 6, 3, 1, 1, 1, 1),
    (7, 13, 19, 11, 3, 2, 1, 1, 1),
    (8, 512, 512, 7, 3, 1, 1, 1, 1),
)
QUICK = shapes(
    patches.NAMES,
    (3, 2, 4, 5, 3, 2, 1, 1, 1),
    (2, 4, 4, 6, 3, 1, 2, 2, 4),
    (2, 3, 2, 3, 1, 1, 0, 1, 1),
)


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    x, g = patches.factors(shape, shape["B"], random)
    return {"x": x, "g": g, **patches.window(shape)}


def _split(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments.pop(name) for name in ("coef", "direction")}


def direct(wanted: frozenset[str], **arguments: Any) -> Outputs:
    tail = _split(arguments)
    out, direction, coef = Outputs(), tail["direction"], tail["coef"]
    x, g = widen(arguments.pop("x")), widen(arguments.pop("g"))
    kernel_size = arguments.pop("kernel_size")
    if "dots" in wanted:
        out["dots"] = (F.conv2d(x, direction, **arguments) * g).sum((1, 2, 3))
    if wanted & {"weighted_sum", "sum_dots"}:
        scaled = g if coef is None else g * coef.view(-1, 1, 1, 1)
        out["weighted_sum"] = patches.weighted_sum(x, scaled, kernel_size, **arguments)
    if "sum_dots" in wanted:
        out["sum_dots"] = (F.conv2d(x, out["weighted_sum"], **arguments) * g).sum((1, 2, 3))
    return out


def unfold(wanted: frozenset[str], **arguments: Any) -> Outputs:
    tail = _split(arguments)
    return reduce_rows(wanted, patches.unfolded(**arguments), **tail)


def vmap(wanted: frozenset[str], **arguments: Any) -> Outputs:
    tail = _split(arguments)
    return reduce_rows(wanted, patches.vmapped(**arguments), **tail)


def partly_unfold(wanted: frozenset[str], **arguments: Any) -> Outputs:
    out = direct(wanted, **arguments)
    _split(arguments)
    rows = patches.unfolded(**arguments)
    return out | reduce_rows(wanted - factored.DIRECT, rows, None, None)


def ghost(wanted: frozenset[str], **arguments: Any) -> Outputs:
    out = direct(wanted, **arguments)
    if wanted - factored.DIRECT:
        _split(arguments)
        by_group = factored.ghost_norms(*patches.as_linear(**arguments))
        out["sq_norms"] = by_group.view(len(arguments["x"]), -1).sum(1)
    return out


def one_by_one(wanted: frozenset[str], **arguments: Any) -> Outputs:
    tail = _split(arguments)
    x, g = widen(arguments.pop("x")), widen(arguments.pop("g"))

    def gradient(b: int) -> Tensor:
        return patches.weighted_sum(x[b : b + 1], g[b : b + 1], **arguments)

    return reduce_one_by_one(wanted, gradient, len(x), **tail)


def _vmap(
    wanted: frozenset[str], x: Tensor, g: Tensor, kernel_size: list[int], groups: int, **rest: Any
) -> float:
    elements = patches.gradient_elements(x, g, kernel_size, groups)
    return rows_workspace(wanted, len(x), elements)


def _unfold(wanted: frozenset[str], **arguments: Any) -> float:
    x, g, kernel_size = (arguments[name] for name in ("x", "g", "kernel_size"))
    return _vmap(wanted, **arguments) + 4.0 * patches.patch_elements(x, g, kernel_size)


def _partly(wanted: frozenset[str], **arguments: Any) -> float | None:
    mixed = wanted & factored.DIRECT and wanted - factored.DIRECT
    return _unfold(wanted, **arguments) if mixed else None


def _ghost(wanted: frozenset[str], **arguments: Any) -> float | None:
    if not wanted <= factored.DIRECT | {"sq_norms"}:
        return None
    if wanted <= factored.DIRECT:
        return 8.0 * arguments["g"].numel()
    x, g, kernel_size = (arguments[name] for name in ("x", "g", "kernel_size"))
    products = len(x) * arguments["groups"] * (g.shape[2] * g.shape[3]) ** 2
    return 8.0 * products + 4.0 * patches.patch_elements(x, g, kernel_size)


def _one_by_one(wanted: frozenset[str], **arguments: Any) -> float | None:
    one = {name: arguments[name][:1] for name in ("x", "g")}
    return _vmap(wanted, **{**arguments, **one}) if wanted <= ONE_BY_ONE else None


WAYS = {
    "unfold": Way(unfold, _unfold),
    "partly unfold": Way(partly_unfold, _partly),
    "vmap": Way(vmap, _vmap),
    "ghost": Way(ghost, _ghost),
    "one by one": Way(one_by_one, _one_by_one),
}
