"""Rules over the gradients of examples by coordinate, from what the tile engine gives."""

from collections.abc import Callable

import torch
from torch import Tensor

from pycoherence.ops.family.order import order_fake
from pycoherence.triton_kernels.engine.factors import Factors, reduce
from pycoherence.triton_kernels.rows.materialised import materialise, row_parts, rows_of

# A grid has no more programs in its second dimension.
_MOST_PARTS = 65535


Helper = Callable[..., tuple[Callable[..., Tensor], int]]
"""From rows, rule, `k` and `drop`: what reduces such rows, and the bytes it takes for a number."""


def ordered(factors: Factors, rule: str, k: float, drop: bool, helper: Helper) -> Tensor:
    """The aggregate of a batch of gradients, `[O, K]`.

    Two rules take sums from the engine and no single gradient: the median of means, whose groups
    are the engine's parts, and sign agreement. For the others, where values are left out, and for
    gradients that are `narrow`, these are materialised, some rows of the parameter at a time that
    the workspace holds, and handed to what the `helper` gives.

    Args:
        factors: Factors of the batch.
        rule: Argument of the op, like the others.
        k: Number of the rule.
        drop: Whether values that are not finite are left out.
        helper: See `Helper`.
    """
    from_sums = not (drop or factors.narrow)
    if from_sums and rule == "sign_agreement" and not factors.empty:
        sums = reduce(factors, frozenset({"weighted_sum", "sign_sum"}), shares_of(factors.g, 1))
        return agreed(sums["weighted_sum"].sum(0), sums["sign_sum"].sum(0), len(factors.x), k)
    out = order_fake(factors.g, factors.shape).zero_()
    if factors.empty:
        return out
    groups = len(factors.x)
    means = from_sums and rule == "median_of_means" and k <= _MOST_PARTS
    if means:
        groups, rule, k = int(k), "median", 0
    shares = shares_of(factors.g, groups)
    aggregate, beside = helper(factors.g, rule, k, drop)
    for part in row_parts(factors, groups * (out.itemsize + beside)):
        rows = rows_of(factors, part)
        values = _sums(rows, shares, groups) if means else materialise(rows)
        out[part] = aggregate(values.flatten(1), rule, k, drop).view_as(out[part])
    return out


def _sums(factors: Factors, coef: Tensor, groups: int) -> Tensor:
    return reduce(factors, frozenset({"weighted_sum"}), coef, parts=groups)["weighted_sum"]


def shares_of(g: Tensor, groups: int) -> Tensor:
    """The weight of each example in the mean of its group, `[B]`.

    Sums weighted by them are finite if and only if all their terms are: a sum before it is divided
    could leave the range of the dtype.
    """
    size, larger = divmod(len(g), groups)
    shares = order_fake(g, (len(g),)).fill_(1 / size)
    shares[: larger * (size + 1)] = 1 / (size + 1)
    return shares


def agreed(mean: Tensor, signs: Tensor, batch: int, k: float) -> Tensor:
    """The mean where the mean of the signs is at least `k`, and zero elsewhere."""
    # A number in place of this tensor would multiply by its reciprocal, which rounds otherwise.
    count = torch.full((), batch, device=mean.device)
    kept = torch.where(signs.abs() / count >= k, mean, 0.0)
    return torch.where(mean.isfinite(), kept, torch.nan)
