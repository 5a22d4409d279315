"""Per-example gradients built one by one with autograd, and their reductions by loops."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycoherence.ops import Reduced


def gradients(forward: Callable[[Tensor, int], Tensor], shape: Sequence[int], g: Tensor) -> Tensor:
    """`[B, *shape]` in float64.

    Args:
        forward: `forward(weight, b)`, what a layer makes of example b, like `g[b : b + 1]`.
        shape: Shape of the weight.
        g: Gradient with respect to what `forward` gives, for all examples.
    """
    rows = torch.zeros(len(g), *shape, dtype=torch.float64)
    for b in range(len(g)):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        out = forward(weight, b)
        if out.requires_grad:
            (rows[b],) = torch.autograd.grad(out, weight, g[b : b + 1].double())
    return rows


def reductions(
    rows: Tensor, want: Sequence[str], coef: Tensor | None, direction: Tensor | None
) -> Reduced:
    """What a `*_reduce` op says of gradients `[B, *shape]`."""
    found: dict[str, Tensor] = {}
    for name in want:
        per_example = name in ("sq_norms", "dots")
        found[name] = torch.zeros(len(rows) if per_example else rows.shape[1:], dtype=torch.float64)
    for b, row in enumerate(rows):
        weight = 1.0 if coef is None else coef[b].double()
        if "sq_norms" in found:
            found["sq_norms"][b] = row.square().sum()
        if "dots" in found:
            assert direction is not None
            found["dots"][b] = (row * direction.double()).sum()
        if "weighted_sum" in found and weight != 0:
            found["weighted_sum"] += weight * row
        if "second_moment" in found:
            found["second_moment"] += row.square()
        if "sign_sum" in found:
            found["sign_sum"] += torch.where(row.isnan(), row, row.sign())
    return Reduced(*(found.get(name) for name in Reduced._fields))
