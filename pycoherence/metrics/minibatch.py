"""The coherence of mini-batch gradients and that of the examples in them, one from the other."""

from pycoherence.metrics._arguments import Number, like, to_count, to_tensor
from pycoherence.metrics._docs import documented

_SIZE = "the number of examples in one mini-batch, not the number of mini-batches"


@documented()
def minibatch_alpha(alpha: Number, k: int) -> Number:
    r"""The alpha of mini-batch gradients, each the mean of `k` independent examples.

    .. math::
        \alpha_k = \frac{k \alpha}{1 + (k - 1) \alpha}

    Range: [alpha, 1], and equal to alpha only at 0 and 1 (or `k = 1`). A small alpha grows about
    `k` times, so mini-batch gradients look far more coherent than examples are.

    Scaling: does not depend on the gradients' scale.

    Args:
        alpha: Alpha of the examples (the population's), a float or a tensor of any shape.
        k: Examples in one mini-batch, at least 1.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217.

    Example:
        >>> minibatch_alpha(0.25, k=4)
        0.5714285714285714
    """
    k = to_count("minibatch_alpha", "k", k, 1, _SIZE)
    a = to_tensor("minibatch_alpha", "alpha", alpha)
    return like(k * a / (1 + (k - 1) * a), alpha)


@documented()
def example_alpha(alpha: Number, k: int) -> Number:
    r"""The alpha of examples, given that of mini-batch gradients of `k` examples each.

    .. math::
        \alpha_1 = \frac{\alpha}{k - (k - 1) \alpha}

    The inverse of `minibatch_alpha`, for networks whose layers mix the examples of a batch.
    `k` is the mini-batch *size*: with 20 mini-batches of 50 examples it is 50. All mini-batches
    must be measured at the same weights, and `alpha` should be `unbiased_alpha` over them,
    because the bias of a few mini-batches is much larger than an example's coherence.

    Range: [0, alpha] for alpha in [0, 1].

    Scaling: does not depend on the gradients' scale.

    Args:
        alpha: Alpha of the mini-batch gradients, a float or a tensor of any shape.
        k: Examples in one mini-batch, at least 1.

    Source: Chatterjee and Zielinski 2022, arXiv:2203.10036.

    Example:
        >>> example_alpha(0.5, k=3)
        0.25
    """
    k = to_count("example_alpha", "k", k, 1, _SIZE)
    a = to_tensor("example_alpha", "alpha", alpha)
    return like(a / (k - (k - 1) * a), alpha)
