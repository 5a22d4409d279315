"""Plain torch for `conv_order`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bench.ops.formulas import orders, patches
from bench.ops.plain import conv_reduce, linear_order
from bench.ops.ways import shapes, widen

# The layers of the CNN that is trained first.
SHAPES = shapes(
    patches.NAMES,
    (64, 3, 32, 32, 3, 1, 1, 1, 1),
    (64, 32, 64, 32, 3, 2, 1, 1, 1),
    (64, 64, 128, 16, 3, 2, 1, 1, 1),
    (64, 128, 128, 8, 3, 1, 1, 1, 1),
    (16, 256, 64, 14, 1, 1, 0, 1, 1),
    (256, 16, 16, 8, 3, 1, 1, 1, 1),
)
QUICK = shapes(patches.NAMES, (6, 2, 4, 5, 3, 2, 1, 1, 1), (5, 3, 2, 3, 1, 1, 0, 1, 1))
inputs = conv_reduce.inputs


def pieces(x: Tensor, g: Tensor, kernel_size: list[int], **options: Any) -> Iterator[Tensor]:
    """`[o, I, K, K, B]` of some output channels at a time; of one group."""
    for values in linear_order.pieces(*patches.as_linear(x, g, kernel_size, **options)):
        yield values.unflatten(1, (-1, *kernel_size))


def gradient(part: slice, x: Tensor, g: Tensor, kernel_size: list[int], **options: Any) -> Tensor:
    return patches.weighted_sum(widen(x[part]), widen(g[part]), kernel_size, **options)


WAYS = {**orders.ways(pieces), "gradients of groups": orders.group_gradients(gradient)}
