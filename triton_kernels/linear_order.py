"""Robust aggregates of per-example gradients of a linear layer's weight, by the tile engine."""

from torch import Tensor

from pycoherence.ops.core.outputs import mask_of
from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.linear_reduce import linear_reduce
from pycoherence.triton_kernels.rows.order import Helper, agreed, ordered, shares_of


def linear_order(
    x: Tensor, g: Tensor, rule: str, k: float, drop: bool, *, helper: Helper
) -> Tensor:
    """The output of `linear_order`, as its schema says; see `rows.order.ordered`.

    Its errors stay below 1e-5 of the largest number, 1e-12 for float64; with TensorFloat-32
    allowed, of its rounding.
    """
    if rule == "sign_agreement" and x.shape[1] == 1 and x.numel() and g.numel() and not drop:
        # The mean and the sum of the signs are a product of two matrices each.
        shares = shares_of(g, 1)
        _, _, mean, _, signs, *_ = linear_reduce(x, g, shares, None, _MEAN_AND_SIGNS)
        assert mean is not None
        assert signs is not None
        return agreed(mean, signs, len(x), k)
    return ordered(Factors.of_linear(x, g), rule, k, drop, helper)


_MEAN_AND_SIGNS = mask_of(("weighted_sum", "sign_sum"))
