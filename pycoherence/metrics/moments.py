"""Signal and noise of each coordinate of the gradient, from its first two moments."""

from pycoherence.metrics._arguments import Number, like, to_count, to_tensors
from pycoherence.metrics._docs import documented


@documented()
def gsnr(first_moment: Number, second_moment: Number) -> Number:
    r"""The signal-to-noise ratio of each coordinate of the gradient.

    .. math::
        r_j = \frac{\mathbb{E}[g_j]^2}{\operatorname{Var}[g_j]}
            = \frac{m_j^2}{v_j - m_j^2}

    with the moments `m_j` and `v_j` of the sample. The variance is that of the sample itself
    (biased); for the variance that divides by `n - 1`, multiply the ratio by `(n - 1) / n`.
    The mean over coordinates, often reported, is ruled by a few large ratios: look at the median
    too.

    Range: [0, inf]; inf where all examples agree, nan where all vanish, as behind a ReLU that is
    off for all: use `nanmean` and `nanmedian`.

    Scaling: unchanged when all gradients are multiplied by one constant. Over a sample of n, pure
    noise reads about `1/n`, not 0.

    Source: Liu et al. 2020, arXiv:2001.07384.

    Example:
        >>> gsnr(first_moment=1.0, second_moment=5.0)
        0.25
    """
    m, v = to_tensors("gsnr", first_moment=first_moment, second_moment=second_moment)
    return like(m**2 / (v - m**2).clamp(min=0), first_moment, second_moment)


@documented()
def coordinate_alpha(first_moment: Number, second_moment: Number) -> Number:
    r"""The coherence of each coordinate of the gradient, from 0 to 1.

    .. math::
        \alpha_j = \frac{\mathbb{E}[g_j]^2}{\mathbb{E}[g_j^2]} = \frac{r_j}{1 + r_j}

    with the signal-to-noise ratio `r_j` of `gsnr`. Weighted by `second_moment` as in
    `combine`, the coordinates give the `alpha` of the whole gradient.

    Range: [0, 1]; 0 where the examples cancel, 1 where they agree, nan where all vanish (use
    `nanmean`).

    Scaling: unchanged when all gradients are multiplied by one constant. Over a sample of n, pure
    noise reads about `1/n`, not 0.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217, for single coordinates.

    Example:
        >>> coordinate_alpha(first_moment=1.0, second_moment=5.0)
        0.2
    """
    m, v = to_tensors("coordinate_alpha", first_moment=first_moment, second_moment=second_moment)
    return like(m**2 / v, first_moment, second_moment)


@documented()
def osgr(first_moment: Number, second_moment: Number, n: int) -> Number:
    r"""The one-step generalisation ratio: how much of a step's gain carries over.

    .. math::
        R = \frac{\mathbb{E}[\Delta L_{\text{test}}]}{\mathbb{E}[\Delta L_{\text{train}}]}
          = 1 - \frac1n \sum_j \frac{W_j}{r_j + 1/n}, \qquad
        W_j = \frac{m_j^2 + \rho_j^2 / n}{\sum_k (m_k^2 + \rho_k^2 / n)}

    for a small step along the mean gradient of `n` training examples, with the signal-to-noise
    ratios `r_j` of `gsnr`, the moments `m_j` and the variances `rho_j^2` of the sample
    (biased). Equal to `minibatch_alpha(alpha, k=n)`, which needs no moments; an
    `unbiased_alpha` there takes out the noise that a small sample leaves in `m_j`.

    Range: [0, 1]; 1 when all examples agree, 0 when they cancel, nan when all gradients vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Args:
        first_moment: Mean of the gradients, a float or a tensor of any shape; the weights run over
            all its elements, so concatenate the parameters of a network first.
        second_moment: Mean of their squares, coordinate by coordinate, same shape.
        n: Number of training examples behind a step, at least 1; the moments may come from fewer.

    Returns:
        A float for floats, else a tensor `[]`, float32 or better.

    Cost: O(P).

    Source: Liu et al. 2020, arXiv:2001.07384.

    Example:
        >>> import torch
        >>> osgr(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]), n=4)
        tensor(0.5000)
    """
    n = to_count("osgr", "n", n, 1, "the number of training examples behind a step")
    m, v = to_tensors("osgr", first_moment=first_moment, second_moment=second_moment)
    # W_j / (r_j + 1/n) is rho_j^2 over the sum in W_j, so no coordinate divides by its own noise.
    signal, noise = (m**2).sum(), (v - m**2).clamp(min=0).sum()
    return like(signal / (signal + noise / n), first_moment, second_moment)
