"""Scores and weights of single examples, from their gradient norms or their logits alone."""

import torch
from torch import Tensor

from pycoherence.metrics._arguments import Number, like, to_count, to_scale, to_tensor
from pycoherence.metrics._docs import documented
from pycoherence.metrics._groups import check_indices


@documented()
def grand(sq_norms: Tensor) -> Tensor:
    r"""The GraNd score of each example: its gradient's norm, averaged over runs.

    .. math::
        \text{GraNd}_b = \mathbb{E}_w \lVert g_b(w) \rVert

    The expectation is over independently initialised runs, measured early in training.

    Range: [0, inf).

    Scaling: with the gradients; `g_b` is the gradient of example b's own loss, not of its share
    of a mean.

    Args:
        sq_norms: Squared gradient norms `[B]`, or `[R, B]` for R runs over the same examples.

    Returns:
        `[B]`, float32 or better.

    Cost: O(R B).

    Source: Paul, Ganguli and Dziugaite 2021, arXiv:2107.07075.

    Example:
        >>> grand(torch.tensor([[9.0, 4.0], [1.0, 0.0]]))
        tensor([2., 1.])
    """
    norms = to_tensor("grand", "sq_norms", sq_norms).sqrt()
    if norms.dim() not in (1, 2):
        raise ValueError(
            f"grand: expected sq_norms [B] or [R, B], got shape {list(norms.shape)}; "
            "stack the runs along the first dimension"
        )
    return norms.mean(dim=0) if norms.dim() == 2 else norms


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    r"""The EL2N score of each example: how far its prediction is from its label.

    .. math::
        \text{EL2N}_b = \mathbb{E}_w \lVert \operatorname{softmax}(f_w(x_b)) - e_{y_b} \rVert

    Range: [0, sqrt(2)]; 0 for a certain and right prediction, sqrt(2) for a certain and wrong one.

    Scaling: does not depend on the loss; shifting all logits of an example changes nothing.

    Args:
        logits: Scores before the softmax, `[B, C]`, or `[R, B, C]` for R runs.
        targets: Class of each example, `[B]`, an integer tensor with values in [0, C).

    Returns:
        `[B]`, averaged over runs, float32 or better.

    Raises:
        ValueError: The shapes disagree, or a target is not a class.
        TypeError: `logits` is not floating point, `targets` is not integer, or the
            devices differ.

    Cost: O(R B C).

    Source: Paul, Ganguli and Dziugaite 2021, arXiv:2107.07075.

    Example:
        >>> el2n(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 0]))
        tensor([0.7071, 1.4142])
    """
    scores = to_tensor("el2n", "logits", logits)
    if scores.dim() not in (2, 3) or targets.shape != scores.shape[-2:-1]:
        raise ValueError(
            "el2n: expected logits [B, C] or [R, B, C] and targets [B], got "
            f"{list(logits.shape)} and {list(targets.shape)}; pass one class index per example"
        )
    check_indices("el2n", "targets", targets, scores.device)
    classes = torch.arange(scores.shape[-1], device=targets.device)
    one_hot = targets.unsqueeze(-1) == classes
    if not one_hot.any(dim=-1).all():
        raise ValueError(
            f"el2n: expected targets in [0, {scores.shape[-1]}), got values from "
            f"{targets.min().item()} to {targets.max().item()}; leave out ignored examples"
        )
    error = torch.softmax(scores, dim=-1) - one_hot.to(scores.dtype)
    norms = error.norm(dim=-1)
    return norms.mean(dim=0) if norms.dim() == 2 else norms


@documented()
def clip_coefficients(sq_norms: Number, max_norm: float) -> Number:
    r"""The factor that clips each gradient to a norm of at most `max_norm`.

    .. math::
        c_b = \min \Bigl( 1, \frac{C}{\lVert g_b \rVert + 10^{-6}} \Bigr)

    The sum of `c_b g_b` is the clipped sum of private training, before noise. The paper divides
    by `max(1, norm / C)`; the added 1e-6, usual in practice, avoids dividing by zero and keeps
    the clipped norm strictly below `max_norm`.

    Range: [0, 1].

    Scaling: depends on the gradients' scale relative to `max_norm`; the norm is over all
    parameters together.

    Args:
        sq_norms: Squared gradient norms, a float or a tensor of any shape.
        max_norm: Largest norm allowed, not negative.

    Returns:
        A float for a float, else a tensor of the same shape, float32 or better. A nan norm gives
        nan.

    Source: Abadi et al. 2016, arXiv:1607.00133.

    Example:
        >>> clip_coefficients(torch.tensor([0.25, 4.0]), max_norm=1.0)
        tensor([1.0000, 0.5000])
    """
    bound = to_scale("clip_coefficients", "max_norm", max_norm)
    norms = to_tensor("clip_coefficients", "sq_norms", sq_norms).sqrt()
    return like((bound / (norms + 1e-6)).clamp(max=1.0), sq_norms)


@documented()
def cge_coefficients(sq_norms: Tensor, f: int) -> Tensor:
    r"""The weights that average the `n - f` gradients of smallest norm.

    .. math::
        c_b = \frac{1}{n - f} \text{ if } \lVert g_b \rVert \text{ is among the } n - f
        \text{ smallest norms, else } 0

    The sum of `c_b g_b` is comparative gradient elimination.

    Range: [0, 1], summing to 1. Equal norms are kept in the order of the examples; nan counts as
    the largest norm.

    Scaling: unchanged when all gradients are multiplied by one constant.

    Args:
        sq_norms: Squared gradient norms, `[n]`.
        f: Gradients to drop, `0 <= f < n`. The guarantees of the source need f well below n/2.

    Returns:
        `[n]`, float32 or better.

    Cost: O(n log n).

    Source: Gupta, Liu and Vaidya 2020, arXiv:2008.04699.

    Example:
        >>> cge_coefficients(torch.tensor([4.0, 100.0, 1.0]), f=1)
        tensor([0.5000, 0.0000, 0.5000])
    """
    caller = "cge_coefficients"
    values = to_tensor(caller, "sq_norms", sq_norms)
    if values.dim() != 1:
        raise ValueError(
            f"{caller}: expected sq_norms [n], got shape {list(values.shape)}; "
            "pass one squared norm per example"
        )
    n = len(values)
    f = to_count(caller, "f", f, 0, "how many gradients to drop")
    if f >= max(n, 1):
        raise ValueError(f"{caller}: expected f < {n}, got {f}; keep at least one gradient")
    kept = values.argsort(stable=True)[: n - f]
    return torch.zeros_like(values).index_fill(0, kept, 1 / max(n - f, 1))
