"""The stability bound on the generalisation gap, as a diagnostic of a training run."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pycoherence.metrics._arguments import has_tensor, stack, to_count, to_scale
from pycoherence.metrics._docs import documented


@overload
def generalization_bound(
    alphas: Sequence[float],
    learning_rates: float | Sequence[float],
    n: int,
    *,
    lipschitz: float = 1.0,
    smoothness: float,
) -> float: ...


@overload
def generalization_bound(
    alphas: Tensor | Sequence[Tensor],
    learning_rates: float | Tensor | Sequence[float],
    n: int,
    *,
    lipschitz: float = 1.0,
    smoothness: float,
) -> Tensor: ...


@documented()
def generalization_bound(
    alphas: Tensor | Sequence[float] | Sequence[Tensor],
    learning_rates: float | Tensor | Sequence[float],
    n: int,
    *,
    lipschitz: float = 1.0,
    smoothness: float,
) -> float | Tensor:
    r"""The coherence bound on the generalisation gap, a diagnostic and no certificate.

    .. math::
        |\text{gap}| \le \frac{L^2}{n} \sum_{t=1}^{T}
            \Bigl[ \prod_{k=t+1}^{T} (1 + \eta_k \beta) \Bigr]
            \eta_t \sqrt{2 \, (1 - \alpha(w_{t-1}))}

    for T steps of (stochastic) gradient descent on `n` examples and a loss that is L-Lipschitz
    and beta-smooth in the weights. Both constants are unknown for a real network and the product
    grows exponentially, so compare runs of equal length, `n` and step sizes by it, and read
    nothing into its value. Coherence early in the run counts most.

    Range: [0, inf]; 0 when alpha is 1 at every step. An undefined alpha (nan) gives nan.

    Scaling: with `lipschitz**2`; the alphas do not depend on the gradients' scale.

    Args:
        alphas: Coherence before each step, `[T]`, a tensor or a sequence of floats or of
            scalar tensors. The theorem means the population's alpha: pass
            `unbiased_alpha`. Estimates outside [0, 1] count as the nearer end.
        learning_rates: Step size of each step, `[T]`, or one float for all.
        n: Number of training examples, at least 1.
        lipschitz: L, the largest norm a per-example gradient can have.
        smoothness: beta, the largest change of a per-example gradient per unit of weight change.

    Returns:
        A float for a sequence of floats, else a tensor `[]`, float32 or better.

    Cost: O(T).

    Source: Chatterjee and Zielinski 2022, arXiv:2203.10036.

    Example:
        >>> generalization_bound([0.5, 0.5], learning_rates=0.5, n=8, smoothness=2.0)
        0.1875
    """
    caller = "generalization_bound"
    n = to_count(caller, "n", n, 1, "the number of training examples")
    scale = to_scale(caller, "lipschitz", lipschitz) ** 2 / n
    growth_rate = to_scale(caller, "smoothness", smoothness)
    a = stack(caller, "alphas", alphas)
    eta = stack(caller, "learning_rates", learning_rates)
    _check_steps(a, eta)
    eta = eta.to(a).expand_as(a)
    spread = (2 * (1 - a.clamp(0, 1))).sqrt()
    result = scale * (_product_of_later(1 + growth_rate * eta) * eta * spread).sum()
    return result if has_tensor(alphas) else result.item()


def _product_of_later(factors: Tensor) -> Tensor:
    """For each step the product of the factors of the steps after it."""
    later = torch.cat([factors[1:], factors.new_ones(1)])[: len(factors)]
    return later.flip(0).cumprod(0).flip(0)


def _check_steps(alphas: Tensor, rates: Tensor) -> None:
    if alphas.dim() != 1 or (rates.dim() > 0 and rates.shape != alphas.shape):
        raise ValueError(
            "generalization_bound: expected alphas [T] and learning_rates [T] or one number, got "
            f"shapes {list(alphas.shape)} and {list(rates.shape)}; pass one value per step"
        )
    if not (rates >= 0).all():
        raise ValueError(
            f"generalization_bound: expected learning_rates >= 0, got {rates.min().item()}; "
            "pass the step sizes themselves"
        )
