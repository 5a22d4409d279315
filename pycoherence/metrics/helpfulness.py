"""The part of single examples, and groups of them, in the step along the mean gradient."""

from torch import Tensor

from pycoherence.metrics._arguments import to_tensor, to_tensors
from pycoherence.metrics._docs import documented
from pycoherence.metrics._groups import sum_by_group, to_members


@documented()
def helpfulness(dots: Tensor, sq_norms: Tensor) -> Tensor:
    r"""The number of examples that a small step along each one's gradient helps.

    .. math::
        h_b = \frac{g_b \cdot \sum_c g_c}{\lVert g_b \rVert^2}
            = \frac{n \, g_b \cdot \bar g}{\lVert g_b \rVert^2}

    To first order, the decrease of the whole sample's loss by a step along example b's gradient,
    in units of b's own decrease. The count includes the example itself; `h_b - 1` counts the
    others. The mean over examples, weighted by their squared norms, is `m_coherence`.

    Range: any real number; 1 when the gradient is orthogonal to all others, n when all are equal,
    negative when the step harms the sample on balance, nan for a gradient that vanishes.

    Scaling: unchanged when all gradients are multiplied by one constant. `dots` are with the
    *mean* gradient of the same examples; divide dots with their sum by n first.

    Returns:
        `[..., n]`, float32 or better.

    Source: per-example form, ours, of the m-coherence of arXiv:2008.01217.

    Example:
        >>> import torch
        >>> helpfulness(dots=torch.tensor([1.0, 0.5]), sq_norms=torch.tensor([1.0, 2.0]))
        tensor([2.0000, 0.5000])
    """
    d, q = to_tensors("helpfulness", dots=dots, sq_norms=sq_norms)
    _check_examples("helpfulness", d)
    return d.shape[-1] * (d / q)


@documented()
def share(dots: Tensor) -> Tensor:
    r"""Each example's share of the squared norm of the mean gradient.

    .. math::
        s_b = \frac{g_b \cdot \sum_c g_c}{\lVert \sum_c g_c \rVert^2}

    To first order, the part of the loss decrease of a step along the mean gradient that the
    gradient of example b brings about: `group_share` of one example.

    Range: any real number, summing to 1 over the sample; negative for an example that holds the
    step back, `1/n` each when all gradients are equal, nan when all dots are 0.

    Scaling: unchanged when `dots` are multiplied by one constant, so dots with the mean or with
    the sum of the gradients of the same examples give the same.

    Returns:
        `[..., n]`, float32 or better.

    Source: Chatterjee 2020, arXiv:2002.10657, for groups of one.

    Example:
        >>> import torch
        >>> share(torch.tensor([3.0, 2.0, -1.0]))
        tensor([ 0.7500,  0.5000, -0.2500])
    """
    d = to_tensor("share", "dots", dots)
    _check_examples("share", d)
    return d / d.sum(dim=-1, keepdim=True)


def group_share(dots: Tensor, groups: Tensor, num_groups: int | None = None) -> Tensor:
    r"""Each group's share of the squared norm of the mean gradient, such as the corrupt's.

    .. math::
        f^A = \frac{\langle g, g^A \rangle}{\langle g, g \rangle}, \qquad
        g = \sum_b g_b, \quad g^A = \sum_{b \in A} g_b

    To first order, the part of the loss decrease of a step that the examples of A bring about.

    Range: any real number, summing to 1 over the groups; 0 for a group without members; nan when
    all dots are 0.

    Scaling: unchanged when `dots` are multiplied by one constant, so dots with the mean or with
    the sum of the gradients of the same examples give the same. A share grows with its group's
    size: compare it with the group's share of the examples.

    Args:
        dots: Dot products of the gradients with their mean, `[..., n]`; the last dimension is
            the whole sample, others may hold layers or steps.
        groups: Group of each example, `[n]`: an integer tensor with values in [0, K), or a mask
            for two groups, False being the first.
        num_groups: K; one more than the largest value (2 for a mask) unless given.

    Returns:
        `[..., K]`, float32 or better.

    Raises:
        ValueError: The shapes disagree, or a value is not a group.
        TypeError: `dots` is not floating point, `groups` is not integer or a mask, or the
            devices differ.

    Cost: O(n K).

    Source: Chatterjee 2020, arXiv:2002.10657.

    Example:
        >>> import torch
        >>> is_pristine = torch.tensor([True, True, False])
        >>> group_share(torch.tensor([3.0, 2.0, -1.0]), is_pristine)
        tensor([-0.2500,  1.2500])
    """
    d = to_tensor("group_share", "dots", dots)
    _check_examples("group_share", d)
    members = to_members("group_share", "groups", groups, num_groups, d)
    return sum_by_group(d, members) / d.sum(dim=-1, keepdim=True)


def _check_examples(caller: str, dots: Tensor) -> None:
    if dots.dim() == 0:
        raise ValueError(
            f"{caller}: expected dots [..., n], got a single number; pass one dot per example, "
            "examples along the last dimension"
        )
