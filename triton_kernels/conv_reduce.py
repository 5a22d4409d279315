"""Reductions over the per-example gradients of a convolution's weight, by the tile engine.

Depthwise convolutions, which would leave its tiles all but empty, are rows: see `Factors.narrow`.
Patches are gathered as they are multiplied, so nothing is unfolded. There is no route by the Grams
of positions, even where these are few: it would save time for norms alone, and a training step
wants the weight gradient from the same pass.
"""

from collections.abc import Set

from torch import Tensor

from pycoherence.ops.family.conv import conv_shape
from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.engine.outputs import reduced
from pycoherence.triton_kernels.launch.finish import Completed, Finish, SumRequest
from pycoherence.triton_kernels.rows.materialised import gram_of_tiles


@Completed
def conv_reduce(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    coef: Tensor | None,
    direction: Tensor | None,
    wanted: Set[str],
    request: SumRequest,
    finish: Finish,
) -> tuple[Tensor | None, ...]:
    """The outputs of `conv_reduce`, as its schema says, which `finish` completes.

    The outputs come from one pass over the factors, `sum_dots` from a second one if gradients
    are not rows, the Gram from materialised rows of the weight. Errors stay below 1e-5 of the
    largest number of an output, 1e-12 for float64; with TensorFloat-32 allowed, of its rounding.
    """
    options = (kernel_size, stride, padding, dilation, groups)
    factors = Factors.of_conv(x, g, *options)
    shape = conv_shape(x, g, kernel_size, groups)
    out = [
        each.view(shape) if each is not None and each.shape == factors.shape else each
        for each in reduced(factors, coef, direction, wanted, request, finish)
    ]
    if "gram" in wanted:
        out[-1] = gram_of_tiles(factors)
    return tuple(out)
