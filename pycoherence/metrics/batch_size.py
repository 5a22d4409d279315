"""The size up to which a mini-batch is worth its cost: gradient diversity and noise scale."""

from pycoherence.metrics._arguments import EXAMPLES, Number, like, to_count, to_tensors
from pycoherence.metrics._docs import documented


@documented()
def gradient_diversity(sum_sq_norm: Number, total_sq_norm: Number) -> Number:
    r"""The gradient diversity, the reciprocal of m-coherence.

    .. math::
        \Delta = \frac{\sum_i \lVert g_i \rVert^2}{\lVert \sum_i g_i \rVert^2} = \frac{1}{M}

    Range: [1/n, inf]; `1/n` when the gradients are equal, 1 when they are orthogonal, inf when
    they cancel, nan when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Source: Yin et al. 2018, arXiv:1706.05699.

    Example:
        >>> gradient_diversity(sum_sq_norm=20.0, total_sq_norm=8.0)
        0.4
    """
    s, q = to_tensors("gradient_diversity", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like(q / s, sum_sq_norm, total_sq_norm)


@documented()
def batch_size_bound(sum_sq_norm: Number, total_sq_norm: Number, n: int) -> Number:
    r"""The batch size up to which mini-batch SGD keeps pace with single-example SGD.

    .. math::
        B_S = n \, \Delta = \frac{1}{\alpha}

    Range: [1, inf]; 1 when the gradients are equal, n when they are orthogonal, inf when they
    cancel, nan when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Source: Yin et al. 2018, arXiv:1706.05699.

    Example:
        >>> batch_size_bound(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        1.6
    """
    n = to_count("batch_size_bound", "n", n, 1, EXAMPLES)
    s, q = to_tensors("batch_size_bound", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like(n * (q / s), sum_sq_norm, total_sq_norm)


@documented(n="Number of gradients, at least 2.")
def noise_scale(sum_sq_norm: Number, total_sq_norm: Number, n: int) -> Number:
    r"""The simple gradient noise scale, estimated from one batch.

    .. math::
        B_{\text{simple}} = \frac{\operatorname{tr} \Sigma}{\lVert G \rVert^2}
            = \frac{n \sum_i \lVert g_i \rVert^2 - \lVert \sum_i g_i \rVert^2}
                   {\lVert \sum_i g_i \rVert^2 - \sum_i \lVert g_i \rVert^2}
            = \frac{n - M}{M - 1}

    The ratio of the unbiased `gradient_variance` to the unbiased `gradient_sq_norm`.
    The ratio itself is biased and noisy: over several batches of one size, average
    `sum_sq_norm` and `total_sq_norm` first and take the ratio once.

    Range: [0, inf] when the gradients are aligned (`M >= 1`), 0 when they are equal; negative
    when they cancel (`M < 1`), which says that `n` is too small to see the mean gradient; nan
    when they all vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Source: McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> noise_scale(sum_sq_norm=20.0, total_sq_norm=8.0, n=4)
        1.0
    """
    n = to_count("noise_scale", "n", n, 2, EXAMPLES)
    s, q = to_tensors("noise_scale", sum_sq_norm=sum_sq_norm, total_sq_norm=total_sq_norm)
    return like((n * q - s) / (s - q), sum_sq_norm, total_sq_norm)


@documented()
def noise_scale_two_batch(
    small_sq_norm: Number, big_sq_norm: Number, small_size: int, big_size: int
) -> Number:
    r"""The simple gradient noise scale from mean gradients of two batch sizes.

    .. math::
        B_{\text{simple}} = \frac{\operatorname{tr} \Sigma}{\lVert G \rVert^2}, \quad
        \lVert G \rVert^2
            = \frac{B_b \lVert G_b \rVert^2 - B_s \lVert G_s \rVert^2}{B_b - B_s}, \quad
        \operatorname{tr} \Sigma
            = \frac{\lVert G_s \rVert^2 - \lVert G_b \rVert^2}{1 / B_s - 1 / B_b}

    Equal to `noise_scale` when `small_sq_norm` is the mean squared norm of the `n`
    examples (`small_size=1`) and `big_sq_norm` that of their mean (`big_size=n`). A single
    pair of batches is very noisy: average the squared norms over many steps, then call this once.

    Range: any real number or inf; a negative value is an estimate drowned in noise; nan when both
    norms vanish.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Args:
        small_sq_norm: Squared norm of the mean gradient of a small batch (or the average over
            such batches), a float or a tensor of any shape.
        big_sq_norm: The same for a big batch, same shape as `small_sq_norm`.
        small_size: Examples in a small batch, at least 1.
        big_size: Examples in a big batch, more than `small_size`.

    Source: McCandlish et al. 2018, arXiv:1812.06162.

    Example:
        >>> noise_scale_two_batch(2.0, 1.25, small_size=1, big_size=4)
        1.0
    """
    caller = "noise_scale_two_batch"
    few = to_count(caller, "small_size", small_size, 1, "the examples in a small batch")
    many = to_count(
        caller, "big_size", big_size, few + 1, "the examples in a big batch, above small_size"
    )
    small, big = to_tensors(caller, small_sq_norm=small_sq_norm, big_sq_norm=big_sq_norm)
    # tr(Sigma) and |G|^2 share the factor 1 / (many - few), which drops out of their ratio.
    ratio = few * many * (small - big) / (many * big - few * small)
    return like(ratio, small_sq_norm, big_sq_norm)
