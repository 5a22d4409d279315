"""Stiffness: whether a step on one example helps another one, within and between classes."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pycoherence.metrics._docs import documented
from pycoherence.metrics._groups import sum_by_group, to_members
from pycoherence.metrics._pairs import off_diagonal_mean, similarity

_KINDS = ("cos", "sign")


class ClassStiffness(NamedTuple):
    """Stiffness by class, as `class_stiffness` gives it.

    Attributes:
        matrix: `[K, K]`, the mean over pairs of an example of class a and one of class b.
        within: `[]`, the mean of the diagonal of `matrix`.
        between: `[]`, the mean off the diagonal.
    """

    matrix: Tensor
    within: Tensor
    between: Tensor


@documented()
def stiffness(gram: Tensor, kind: Literal["cos", "sign"] = "cos") -> Tensor:
    r"""Stiffness: how far a step on one example helps another one, over all pairs.

    .. math::
        S_{\cos} = \frac{1}{B (B - 1)} \sum_{i \ne j} \cos(g_i, g_j)
        \qquad\text{or}\qquad
        S_{\text{sign}} = \frac{1}{B (B - 1)} \sum_{i \ne j} \operatorname{sign}(g_i \cdot g_j)

    Examples are not paired with themselves. Between two samples, such as training and validation,
    average `cosines(gram, sq_norms)` or the signs of their cross Gram.

    Range: [-1/(B-1), 1] for cosines, [-1, 1] for signs; 0 when the gradients are orthogonal, 1
    when they point the same way, nan without a pair. A gradient that vanishes counts 0 among the
    signs and makes the cosines nan: leave such examples out.

    Scaling: unchanged when any gradient is multiplied by a positive constant.

    Args:
        gram: Dot products of the gradients with each other, `[B, B]`.
        kind: `"cos"` or `"sign"`. The source prefers cosines within classes and signs between.

    Returns:
        `[]`, float32 or better.

    Cost: O(B^2).

    Source: Fort et al. 2019, arXiv:1901.09491.

    Example:
        >>> stiffness(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor(0.5000)
    """
    return off_diagonal_mean(similarity("stiffness", gram, kind, _KINDS))


def class_stiffness(
    gram: Tensor,
    classes: Tensor,
    kind: Literal["cos", "sign"] = "cos",
    *,
    num_classes: int | None = None,
) -> ClassStiffness:
    r"""Stiffness for each pair of classes, and its means within and between classes.

    .. math::
        C(a, b) = \mathbb{E}_{i \in a, \, j \in b, \, i \ne j} \, S(g_i, g_j), \qquad
        S_{\text{within}} = \frac{1}{K} \sum_a C(a, a), \quad
        S_{\text{between}} = \frac{1}{K (K - 1)} \sum_{a \ne b} C(a, b)

    S is the cosine or the sign of `stiffness`. Examples are not paired with themselves. The
    classes may be any groups: with training and validation examples in one sample, `matrix`
    holds train-train, train-val and val-val stiffness.

    Range: [-1, 1]. An entry of `matrix` without a pair is nan, and the means leave it out; they
    are nan when nothing is left. A gradient that vanishes counts 0 among the signs and makes the
    cosines of its class nan.

    Scaling: unchanged when any gradient is multiplied by a positive constant.

    Args:
        gram: Dot products of the gradients with each other, `[B, B]`.
        classes: Class of each example, `[B]`: an integer tensor with values in [0, K), or a mask
            for two classes, False being the first.
        kind: `"cos"` or `"sign"`. The source prefers cosines within classes and signs between.
        num_classes: K; one more than the largest value (2 for a mask) unless given.

    Returns:
        `matrix` `[K, K]`, `within` and `between` `[]`, float32 or better.

    Raises:
        ValueError: The shapes disagree, `kind` is another, or a value is not a class.
        TypeError: `gram` is not floating point, `classes` is not integer or a mask, or the
            devices differ.

    Cost: O(B^2 K).

    Source: Fort et al. 2019, arXiv:1901.09491.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> class_stiffness(g @ g.T, torch.tensor([0, 0, 1, 1, 1])).matrix
        tensor([[ 1.0000, -0.3333],
                [-0.3333,  0.3333]])
    """
    pairs = similarity("class_stiffness", gram, kind, _KINDS)
    members = to_members("class_stiffness", "classes", classes, num_classes, pairs)
    sums = sum_by_group(sum_by_group(pairs.clone().fill_diagonal_(0), members).T, members).T
    sizes = members.sum(dim=1)
    counts = sizes.unsqueeze(1) * sizes - sizes.diag()
    matrix = sums / counts
    same = torch.eye(len(sizes), dtype=torch.bool, device=sizes.device)
    means = [
        torch.where(kept, matrix, 0.0).sum() / kept.sum()
        for kept in (same & (counts > 0), ~same & (counts > 0))
    ]
    return ClassStiffness(matrix, *means)
