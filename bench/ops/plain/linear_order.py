"""Plain torch for `linear_order`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.ops.formulas import factored, orders
from bench.ops.plain import linear_reduce
from bench.ops.ways import Outputs, Way, shapes, widen

SHAPES = shapes(
    "B T I O",
    (128, 1, 512, 512),
    (32, 1, 1024, 1024),
    (256, 1, 512, 512),
    (32, 16, 256, 256),
    (16, 128, 256, 768),
    (1024, 4, 64, 64),
)
QUICK = shapes("B T I O", (6, 1, 8, 5), (5, 4, 3, 6), (8, 9, 16, 2))
inputs = linear_reduce.inputs


def pieces(x: Tensor, g: Tensor) -> Iterator[Tensor]:
    """`[o, I, B]` of some output features at a time."""
    x, g = widen(x), widen(g)
    for part in orders.steps(g.shape[2], 4.0 * x.shape[0] * x.shape[2]):
        if x.shape[1] == 1:
            yield g[:, 0, part].T.unsqueeze(1) * x[:, 0].T
        else:
            yield factored.gradients(x, g[:, :, part]).movedim(0, -1).contiguous()


def gradient(part: slice, x: Tensor, g: Tensor) -> Tensor:
    return factored.weighted_sum(widen(x[part]), widen(g[part]), None)


def signs(wanted: frozenset[str], x: Tensor, g: Tensor, k: float, **rest: Any) -> Outputs:
    """With one position the sign of a product is that of its factors."""
    out = factored.single(frozenset({"weighted_sum", "sign_sum"}), widen(x), widen(g), None, None)
    found = (out["weighted_sum"] / len(x)) * (out["sign_sum"].abs() / len(x) >= k)
    return dict.fromkeys(wanted, found)


def _signs(wanted: frozenset[str], x: Tensor, rule: str, **rest: Any) -> float | None:
    return 0.0 if rule == "sign_agreement" and x.shape[1] == 1 else None


WAYS = {
    **orders.ways(pieces),
    "gradients of groups": orders.group_gradients(gradient),
    "outer products": Way(signs, _signs),
}
