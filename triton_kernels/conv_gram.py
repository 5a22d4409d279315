"""Dot products of per-example gradients of a convolution's weight, by the tile engine.

Some rows of the weight are materialised for all examples and multiplied. Products of the Grams of
positions, as linear layers have them, are not taken: patches would have to be unfolded for them.
"""

from torch import Tensor

from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.rows.materialised import gram_of_tiles


def conv_gram(
    x1: Tensor,
    g1: Tensor,
    x2: Tensor | None,
    g2: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The output of `conv_gram`, as its schema says.

    Its errors stay below 1e-5 of the largest number, 1e-12 for float64; with TensorFloat-32
    allowed, of its rounding.
    """
    options = (kernel_size, stride, padding, dilation, groups)
    one = Factors.of_conv(x1, g1, *options)
    if x2 is None or g2 is None:
        return gram_of_tiles(one)
    return gram_of_tiles(one, Factors.of_conv(x2, g2, *options))
