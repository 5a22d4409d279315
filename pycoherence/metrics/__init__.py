"""Formulas on gradient statistics: pure functions of floats or tensors.

Three numbers describe a sample of gradients ``g_1 .. g_n`` and carry the same names everywhere:

- ``sum_sq_norm``: S, the squared norm of their sum;
- ``total_sq_norm``: Q, the sum of their squared norms;
- ``n``: how many there are.

S and Q may be floats, or tensors of one shape (one entry per layer or per step, say); floats give
floats, tensors give tensors. Both add up over layers. A ratio of nothing to nothing is nan.
"""

from pycoherence.metrics.batch_size import (
    batch_size_bound,
    gradient_diversity,
    noise_scale,
    noise_scale_two_batch,
)
from pycoherence.metrics.bound import generalization_bound
from pycoherence.metrics.coherence import alpha, m_coherence, unbiased_alpha
from pycoherence.metrics.examples import cge_coefficients, clip_coefficients, el2n, grand
from pycoherence.metrics.layers import combine
from pycoherence.metrics.minibatch import example_alpha, minibatch_alpha
from pycoherence.metrics.noise import (
    gradient_sq_norm,
    gradient_variance,
    normalized_gradient_variance,
)

__all__ = [
    "alpha",
    "batch_size_bound",
    "cge_coefficients",
    "clip_coefficients",
    "combine",
    "el2n",
    "example_alpha",
    "generalization_bound",
    "gradient_diversity",
    "gradient_sq_norm",
    "gradient_variance",
    "grand",
    "m_coherence",
    "minibatch_alpha",
    "noise_scale",
    "noise_scale_two_batch",
    "normalized_gradient_variance",
    "unbiased_alpha",
]
