"""Robust aggregates of per-example gradients of a convolution's weight, by the tile engine."""

from torch import Tensor

from pycoherence.ops.family.conv import conv_shape
from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.rows.order import Helper, ordered


def conv_order(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rule: str,
    k: float,
    drop: bool,
    *,
    helper: Helper,
) -> Tensor:
    """The output of `conv_order`, as its schema says; see `rows.order.ordered`.

    Its errors stay below 1e-5 of the largest number, 1e-12 for float64; with TensorFloat-32
    allowed, of its rounding.
    """
    options = (kernel_size, stride, padding, dilation, groups)
    found = ordered(Factors.of_conv(x, g, *options), rule, k, drop, helper)
    return found.view(conv_shape(x, g, kernel_size, groups))
