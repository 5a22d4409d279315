"""Agreement of the gradients' signs, coordinate by coordinate, from the sum of the signs."""

from torch import Tensor

from pycoherence.metrics._arguments import EXAMPLES, Number, like, to_count, to_tensor
from pycoherence.metrics._docs import documented
from pycoherence.metrics._pairs import signs


@documented()
def sign_agreement(sign_sum: Number, n: int) -> Number:
    r"""The agreement of the signs of the gradients, for each coordinate.

    .. math::
        a_j = \Bigl\lvert \frac1n \sum_b \operatorname{sign}(g_{b,j}) \Bigr\rvert

    The AND-mask of the source keeps the coordinates whose agreement reaches a threshold; its
    "examples" are the mean gradients of environments.

    Range: [0, 1]; 0 when positive and negative signs balance, 1 when all are the same.

    Scaling: unchanged when any gradient is multiplied by a positive constant. Over a sample of n,
    signs drawn at random read about `0.8 / sqrt(n)`, not 0.

    Source: Parascandolo et al. 2020, arXiv:2009.00329.

    Example:
        >>> sign_agreement(-2.0, n=4)
        0.5
    """
    return like(_agreement("sign_agreement", sign_sum, n), sign_sum)


@documented()
def same_sign_share(sign_sum: Number, n: int) -> Number:
    r"""The share of the examples whose gradient has the majority's sign, by coordinate.

    .. math::
        p_j = \frac{1 + a_j}{2}

    with the agreement `a_j` of `sign_agreement`. A gradient of 0 counts half for either
    sign. Its mean over coordinates follows the `p_same_sign` of the source.

    Range: [1/2, 1]; 1/2 when positive and negative signs balance, 1 when all are the same.

    Scaling: unchanged when any gradient is multiplied by a positive constant. Over a sample of n,
    signs drawn at random read about `1/2 + 0.4 / sqrt(n)`.

    Source: Liu et al. 2020, arXiv:2001.07384.

    Example:
        >>> same_sign_share(-2.0, n=4)
        0.75
    """
    return like((1 + _agreement("same_sign_share", sign_sum, n)) / 2, sign_sum)


@documented()
def sign_vote(sign_sum: Number) -> Number:
    r"""The sign that the majority of the gradients has, for each coordinate.

    .. math::
        \operatorname{sign} \Bigl( \sum_b \operatorname{sign}(g_{b,j}) \Bigr)

    Range: -1, 0 or 1; 0 for a tie.

    Scaling: unchanged when any gradient is multiplied by a positive constant.

    Returns:
        A float for a float, else a tensor of the same shape, float32 or better; nan stays nan.

    Raises:
        TypeError: `sign_sum` is not floating point.

    Source: Bernstein et al. 2018, arXiv:1810.05291.

    Example:
        >>> sign_vote(-2.0)
        -1.0
    """
    return like(signs(to_tensor("sign_vote", "sign_sum", sign_sum)), sign_sum)


def _agreement(caller: str, sign_sum: float | Tensor, n: int) -> Tensor:
    n = to_count(caller, "n", n, 1, EXAMPLES)
    return to_tensor(caller, "sign_sum", sign_sum).abs() / n
