"""Signal and noise of a sample of gradients: size of the mean, variance, and their ratios."""

from pycoherence.metrics._arguments import EXAMPLES, Number, like, to_count, to_tensors
from pycoherence.metrics._docs import documented


@documented()
def gradient_sq_norm(
    sum_sq_norm: Number, total_sq_norm: Number, n: int, *, unbiased: bool = True
) -> Number:
    r"""The squared norm of the mean gradient.

    .. math::
        \widehat{\lVert G \rVert^2}
            = \frac{\lVert \sum_i g_i \rVert^2 - \sum_i \lVert g_i \rVert^2}{n (n - 1)}
        \quad\text{or, biased,}\quad \frac{\lVert \sum_i g_i \rVert^2}{n^2}

    The biased form exceeds the population's value by `tr(Sigma) / n` on average.

    Range: the unbiased estimate is negative when the gradients cancel (`M < 1`).

    Scaling: with the square of the gradients.

    Args:
        sum_sq_norm: Squared norm of the sum of the gradients, a float or a tensor of any shape.
        total_sq_norm: Sum of their squared norms, same shape as `sum_sq_norm`.
        n: Number of gradients, at least 2 (1 when biased).
        unbiased: Estimate the population's mean gradient instead of measuring the sample's.

    Source: McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> gradient_sq_norm(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        1.0
    """
    n = to_count("gradient_sq_norm", "n", n, 2 if unbiased else 1, EXAMPLES)
    s, q = to_tensors("gradient_sq_norm", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    result = (s - q) / (n * (n - 1)) if unbiased else s / n**2
    return like(result, sum_sq_norm, total_sq_norm)


@documented(
    n="Number of gradients, at least 2 (1 when biased).",
    unbiased="Divide by `n - 1` instead of `n`.",
)
def gradient_variance(
    sum_sq_norm: Number, total_sq_norm: Number, n: int, *, unbiased: bool = True
) -> Number:
    r"""The trace of the covariance of the gradients: their spread about the mean.

    .. math::
        \operatorname{tr} \Sigma = \frac{1}{n - 1}
            \Bigl( \sum_i \lVert g_i \rVert^2 - \frac{1}{n} \lVert \textstyle\sum_i g_i \rVert^2
            \Bigr)

    with `1/n` in front when biased.

    Range: [0, inf); 0 when the gradients are equal. Nearly equal gradients cancel in the
    difference, so accumulate both sums in float64.

    Scaling: with the square of the gradients.

    Source: Faghri et al. 2020, arXiv:2007.04532; McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> gradient_variance(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        1.0
    """
    n = to_count("gradient_variance", "n", n, 2 if unbiased else 1, EXAMPLES)
    s, q = to_tensors("gradient_variance", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like((q - s / n) / (n - 1 if unbiased else n), sum_sq_norm, total_sq_norm)


@documented()
def normalized_gradient_variance(sum_sq_norm: Number, total_sq_norm: Number, n: int) -> Number:
    r"""The variance of the gradients over the squared norm of their mean.

    .. math::
        \frac{\frac1n \sum_i \lVert g_i \rVert^2 - \lVert \bar g \rVert^2}{\lVert \bar g \rVert^2}
            = \frac{1 - \alpha}{\alpha}

    Both are those of the sample (biased) and are summed over all coordinates before dividing. Pass
    mini-batch gradients for the noise of mini-batches, as in the source, or examples for theirs.
    Variance over the second moment, another form in use, is `1 - alpha`.

    Range: [0, inf]; 0 when the gradients are equal, 1 when signal and noise are of one size,
    inf when the gradients cancel, nan when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Source: Faghri et al. 2020, arXiv:2007.04532.

    Example:
        >>> normalized_gradient_variance(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        0.6
    """
    caller = "normalized_gradient_variance"
    n = to_count(caller, "n", n, 1, "the number of gradients behind the sums")
    s, q = to_tensors(caller, sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like((n * q - s) / s, sum_sq_norm, total_sq_norm)
