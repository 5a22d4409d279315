"""Formulas for gradients `G_b = sum_t g_bt x_bt^T`, from `x` `[B, T, I]` and `g` `[B, T, O]`."""

import torch
from torch import Tensor

from bench.ops.ways import Outputs

DIRECT = frozenset({"weighted_sum", "dots", "sum_dots"})
"""Outputs that are linear in each gradient: they take products of the whole batch."""


def gradients(x: Tensor, g: Tensor) -> Tensor:
    """`[B, O, I]`."""
    return torch.bmm(g.mT, x)


def weighted_sum(x: Tensor, g: Tensor, coef: Tensor | None) -> Tensor:
    scaled = g if coef is None else g * coef.view(-1, 1, 1)
    return scaled.flatten(0, 1).mT @ x.flatten(0, 1)


def dots(x: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    return ((x @ direction.mT) * g).sum((1, 2))


def direct(
    wanted: frozenset[str], x: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None
) -> Outputs:
    out = Outputs()
    if "dots" in wanted and direction is not None:
        out["dots"] = dots(x, g, direction)
    if wanted & {"weighted_sum", "sum_dots"}:
        out["weighted_sum"] = weighted_sum(x, g, coef)
    if "sum_dots" in wanted:
        out["sum_dots"] = dots(x, g, out["weighted_sum"])
    return out


def ghost_norms(x: Tensor, g: Tensor) -> Tensor:
    return ((x @ x.mT) * (g @ g.mT)).sum((1, 2))


def ghost_gram(x1: Tensor, g1: Tensor, x2: Tensor, g2: Tensor) -> Tensor:
    b1, b2, t1, t2 = len(x1), len(x2), x1.shape[1], x2.shape[1]
    products = x1.flatten(0, 1) @ x2.flatten(0, 1).mT
    products *= g1.flatten(0, 1) @ g2.flatten(0, 1).mT
    return products.view(b1, t1, b2, t2).sum((1, 3))


def single(
    wanted: frozenset[str], x: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None
) -> Outputs:
    """All outputs for `T = 1`, where every gradient is one outer product."""
    out = direct(wanted, x, g, coef, direction)
    x, g = x[:, 0], g[:, 0]
    if "sq_norms" in wanted:
        norms = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g, dim=1)
        out["sq_norms"] = norms.square()
    if "gram" in wanted:
        out["gram"] = (x @ x.T) * (g @ g.T)
    if "second_moment" in wanted:
        out["second_moment"] = g.square().T @ x.square()
    if "sign_sum" in wanted:
        out["sign_sum"] = g.sign().T @ x.sign()
    return out
