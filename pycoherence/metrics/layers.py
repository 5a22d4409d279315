"""From per-layer coherence to that of the whole network."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pycoherence.metrics._arguments import has_tensor, stack, to_tensors
from pycoherence.metrics._docs import documented


@overload
def combine(values: Sequence[float], total_sq_norms: Sequence[float]) -> float: ...


@overload
def combine(
    values: Tensor | Sequence[Tensor], total_sq_norms: Tensor | Sequence[Tensor]
) -> Tensor: ...


@documented()
def combine(
    values: Tensor | Sequence[float] | Sequence[Tensor],
    total_sq_norms: Tensor | Sequence[float] | Sequence[Tensor],
) -> float | Tensor:
    r"""The whole network's coherence from its layers', weighted by their squared norms.

    .. math::
        \alpha = \sum_l f_l \alpha_l, \qquad
        f_l = \frac{\sum_i \lVert g_{i,l} \rVert^2}{\sum_{l'} \sum_i \lVert g_{i,l'} \rVert^2}

    Exact for any split of the parameters into disjoint groups, and for `alpha`,
    `m_coherence` and `unbiased_alpha` alike. Ratios with the sum's norm below the line
    (noise scale, diversity) do not combine so: add both sums over the layers first.

    Range: between the smallest and the largest value. A layer whose gradients all vanish carries
    no weight, so its nan does not count; nan when every layer's do.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Args:
        values: A metric of each layer, one or more: a sequence of floats or of tensors of one
            shape, or a tensor `[L, ...]` with the layers along its first dimension.
        total_sq_norms: Sum of squared gradient norms in each layer, of the same form.

    Returns:
        A float for floats, else a tensor of shape `[...]`, float32 or better.

    Cost: O(L) per element.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217.

    Example:
        >>> combine([1.0, 4.0], total_sq_norms=[3.0, 1.0])
        1.75
    """
    v, q = to_tensors(
        "combine",
        values=stack("combine", "values", values),
        total_sq_norms=stack("combine", "total_sq_norms", total_sq_norms),
    )
    if v.dim() == 0 or len(v) == 0:
        raise ValueError(
            f"combine: expected at least one layer, got shape {list(v.shape)}; "
            "pass one value per layer, layers along the first dimension"
        )
    weighted = torch.where(q == 0, torch.zeros_like(v), v * q)
    result = weighted.sum(dim=0) / q.sum(dim=0)
    return result if has_tensor(values) or has_tensor(total_sq_norms) else result.item()
