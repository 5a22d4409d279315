"""Plain torch for `conv_gram`. `B2 = 0` is the Gram matrix of one batch with itself."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.ops.formulas import factored, patches
from bench.ops.ways import Outputs, Shape, Source, Way, gram, shapes

SHAPES = shapes(
    f"B2 {patches.NAMES}",
    (0, 64, 3, 32, 32, 3, 1, 1, 1, 1),
    (0, 64, 32, 64, 32, 3, 2, 1, 1, 1),
    (0, 64, 64, 128, 16, 3, 2, 1, 1, 1),
    (0, 64, 128, 128, 8, 3, 1, 1, 1, 1),
    (0, 16, 256, 64, 14, 1, 1, 0, 1, 1),
    (0, 8, 3, 64, 64, 7, 2, 3, 1, 1),
    (0, 16, 64, 64, 28, 3, 1, 1, 1, 64),
    (0, 16, 64, 64, 14, 3, 1, 2, 2, 4),
    (5, 7, 13, 19, 11, 3, 2, 1, 1, 1),
    (32, 8, 64, 64, 14, 3, 1, 1, 1, 1),
)
QUICK = shapes(
    f"B2 {patches.NAMES}", (0, 3, 2, 4, 5, 3, 2, 1, 1, 1), (3, 2, 4, 4, 6, 3, 1, 2, 2, 4)
)


def inputs(shape: Shape, random: Source) -> dict[str, Any]:
    x1, g1 = patches.factors(shape, shape["B"], random)
    x2, g2 = patches.factors(shape, shape["B2"], random) if shape["B2"] else (None, None)
    return {"x1": x1, "g1": g1, "x2": x2, "g2": g2, **patches.window(shape)}


def both(
    form: Callable[..., Any],
    x1: Tensor,
    g1: Tensor,
    x2: Tensor | None,
    g2: Tensor | None,
    **window: Any,
) -> tuple[Any, Any]:
    """The factors of both batches, which may be the same, in another form."""
    first = form(x1, g1, **window)
    return first, first if x2 is None else form(x2, g2, **window)


def ghost(wanted: frozenset[str], **arguments: Any) -> Outputs:
    first, second = both(patches.as_linear, **arguments)
    groups = arguments["groups"]
    by_group = [
        factored.ghost_gram(*(factor[i::groups] for factor in (*first, *second)))
        for i in range(groups)
    ]
    return {"gram": sum(by_group[1:], by_group[0])}


def from_rows(rows_of: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The product of the materialised gradients."""

    def run(wanted: frozenset[str], **arguments: Any) -> Outputs:
        rows, other = both(rows_of, **arguments)
        return {"gram": gram(rows.flatten(1), other.flatten(1))}

    return run


def _sizes(arguments: dict[str, Any]) -> tuple[int, int]:
    first, other = arguments["x1"], arguments["x2"]
    return len(first), len(first if other is None else other)


def _ghost(wanted: frozenset[str], **arguments: Any) -> float:
    b1, b2 = _sizes(arguments)
    x1, g1, kernel_size = (arguments[name] for name in ("x1", "g1", "kernel_size"))
    products = b1 * b2 * (g1.shape[2] * g1.shape[3]) ** 2
    return 8.0 * products + 4.0 * patches.patch_elements(x1, g1, kernel_size) * (1 + b2 / b1)


def _vmap(wanted: frozenset[str], **arguments: Any) -> float:
    b1, b2 = _sizes(arguments)
    x1, g1 = arguments["x1"], arguments["g1"]
    elements = patches.gradient_elements(x1, g1, arguments["kernel_size"], arguments["groups"])
    return 4.0 * elements * (b1 + b2)


def _unfold(wanted: frozenset[str], **arguments: Any) -> float:
    x1, g1, kernel_size = (arguments[name] for name in ("x1", "g1", "kernel_size"))
    return _vmap(wanted, **arguments) + 4.0 * patches.patch_elements(x1, g1, kernel_size)


WAYS = {
    "unfold": Way(from_rows(patches.unfolded), _unfold),
    "vmap": Way(from_rows(patches.vmapped), _vmap),
    "ghost": Way(ghost, _ghost),
}
