"""Coherence of a sample of gradients, from the sum's squared norm and the sum of squared norms."""

from pycoherence.metrics._arguments import Number, like, to_count, to_tensors
from pycoherence.metrics._docs import documented


@documented()
def alpha(sum_sq_norm: Number, total_sq_norm: Number, n: int) -> Number:
    r"""The coherence of `n` gradients: how far they point the same way, from 0 to 1.

    .. math::
        \alpha = \frac{\lVert \sum_i g_i \rVert^2}{n \sum_i \lVert g_i \rVert^2}

    To first order this is the loss decrease of a step along the mean gradient over the mean
    decrease were each example free to take its own step.

    Range: [0, 1]; 0 when the gradients cancel, `1/n` when they are orthogonal, 1 when they are
    equal, nan when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant, so mean and sum losses
    agree. A sample of `n` over-estimates the population's value by about `(1 - alpha) / n`;
    see `unbiased_alpha`.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217; 2022, arXiv:2203.10036.

    Example:
        >>> alpha(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        0.625
    """
    n = to_count("alpha", "n", n, 1, "the number of examples behind the sums")
    s, q = to_tensors("alpha", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like(s / q / n, sum_sq_norm, total_sq_norm)


@documented()
def m_coherence(sum_sq_norm: Number, total_sq_norm: Number) -> Number:
    r"""M-coherence: how many examples of the sample one example's step helps.

    .. math::
        M = \frac{\lVert \sum_i g_i \rVert^2}{\sum_i \lVert g_i \rVert^2} = n \, \alpha

    The count includes the example itself; `M - 1` counts the others.

    Range: [0, n]; below 1 when gradients cancel, 1 when they are pairwise orthogonal (whatever
    their norms), k for k copies of each of several orthogonal vectors, n when they are equal, nan
    when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant; it grows with the sample,
    so compare samples of one size.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217.

    Example:
        >>> m_coherence(sum_sq_norm=20.0, total_sq_norm=8.0)
        2.5
    """
    s, q = to_tensors("m_coherence", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like(s / q, sum_sq_norm, total_sq_norm)


@documented(n="Number of gradients, at least 2.")
def unbiased_alpha(sum_sq_norm: Number, total_sq_norm: Number, n: int) -> Number:
    r"""An estimate of the population's alpha that leaves out each gradient's own square.

    .. math::
        \hat\alpha = \frac{\frac{1}{n(n-1)} \sum_{i \ne j} g_i \cdot g_j}
                          {\frac{1}{n} \sum_i \lVert g_i \rVert^2}
                   = \frac{M - 1}{n - 1}

    Numerator and denominator are each unbiased for independent examples; their ratio is
    consistent.

    Range: [-1/(n-1), 1]; 0 when the gradients are orthogonal, 1 when they are equal, nan when they
    all vanish. Estimates of a small coherence can be negative.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Source: bias correction of this library for the alpha of arXiv:2008.01217.

    Example:
        >>> unbiased_alpha(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        0.5
    """
    n = to_count("unbiased_alpha", "n", n, 2, "the number of examples behind the sums")
    s, q = to_tensors("unbiased_alpha", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like((s - q) / q / (n - 1), sum_sq_norm, total_sq_norm)
