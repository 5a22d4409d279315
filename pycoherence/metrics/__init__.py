"""Formulas on gradient statistics: pure functions of floats or tensors.

Three numbers describe a sample of gradients `g_1 .. g_n` and carry the same names everywhere:

- `sum_sq_norm`: S, the squared norm of their sum;
- `total_sq_norm`: Q, the sum of their squared norms;
- `n`: how many there are.

Metrics of single examples take `dots` (with the mean gradient) and `sq_norms`; those of pairs
`gram`, all dot products with each other; those of single coordinates `first_moment` and
`second_moment`, means over the examples, or `sign_sum`.

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
from pycoherence.metrics.gram import confusion, cosines, disparity, gram_sums
from pycoherence.metrics.helpfulness import group_share, helpfulness, share
from pycoherence.metrics.influence import loss_change, tracin
from pycoherence.metrics.jackknife import Interval, alpha_interval, m_coherence_interval
from pycoherence.metrics.layers import combine
from pycoherence.metrics.minibatch import example_alpha, minibatch_alpha
from pycoherence.metrics.moments import coordinate_alpha, gsnr, osgr
from pycoherence.metrics.noise import (
    gradient_sq_norm,
    gradient_variance,
    normalized_gradient_variance,
)
from pycoherence.metrics.signs import same_sign_share, sign_agreement, sign_vote
from pycoherence.metrics.stiffness import ClassStiffness, class_stiffness, stiffness

__all__ = [
    "ClassStiffness",
    "Interval",
    "alpha",
    "alpha_interval",
    "batch_size_bound",
    "cge_coefficients",
    "class_stiffness",
    "clip_coefficients",
    "combine",
    "confusion",
    "coordinate_alpha",
    "cosines",
    "disparity",
    "el2n",
    "example_alpha",
    "generalization_bound",
    "gradient_diversity",
    "gradient_sq_norm",
    "gradient_variance",
    "gram_sums",
    "grand",
    "group_share",
    "gsnr",
    "helpfulness",
    "loss_change",
    "m_coherence",
    "m_coherence_interval",
    "minibatch_alpha",
    "noise_scale",
    "noise_scale_two_batch",
    "normalized_gradient_variance",
    "osgr",
    "same_sign_share",
    "share",
    "sign_agreement",
    "sign_vote",
    "stiffness",
    "tracin",
    "unbiased_alpha",
]
