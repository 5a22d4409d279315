"""The change of a loss by a step, to first order, from dot products of gradients."""

from collections.abc import Sequence

from torch import Tensor

from pycoherence.metrics._arguments import Number, like, stack, to_tensor
from pycoherence.metrics._docs import documented


@documented()
def loss_change(dots: Number, learning_rate: float) -> Number:
    r"""The change of each example's loss by one gradient step, to first order.

    .. math::
        \ell_b(w - \eta v) - \ell_b(w) \approx -\eta \, g_b \cdot v

    With v the batch's mean gradient this is what a step of SGD does to each example.

    Range: any real number; negative when the step lowers the example's loss.

    Scaling: with the gradients, v and the step size. `g_b` is the gradient of example b's own
    loss, not of its share of a mean.

    Args:
        dots: Dot products of the gradients with the direction v, a float or a tensor of any shape.
        learning_rate: Step size, eta; the step is `-learning_rate * v`.

    Raises:
        TypeError: `dots` is not floating point.

    Source: the first-order expansion of Chatterjee and Zielinski 2020, arXiv:2008.01217.

    Example:
        >>> loss_change(2.0, learning_rate=0.5)
        -1.0
    """
    return like(-learning_rate * to_tensor("loss_change", "dots", dots), dots)


@documented()
def tracin(
    dots: Tensor | Sequence[Tensor], learning_rates: float | Tensor | Sequence[float]
) -> Tensor:
    r"""TracIn influences: how far training on one example lowered the loss of another.

    .. math::
        \text{TracInCP}(z, z') = \sum_t \eta_t \, g_z(w_t) \cdot g_{z'}(w_t)

    over T checkpoints. The kind of `dots` decides between whom: cross Grams `[T, B1, B2]` give
    the influence of each example on each other one; dots `[T, B]` with the mean gradient of a
    validation set that on the mean validation loss; squared norms `[T, B]` self-influence.

    Range: any real number; positive for a proponent, negative for an opponent, not negative for
    self-influence.

    Scaling: with the square of the gradients and with the step sizes. The gradients are those of
    the examples' own losses, not of their shares of a mean.

    Args:
        dots: Dot products at each checkpoint, `[T, ...]` with T at least 1, a tensor or a
            sequence of tensors of one shape.
        learning_rates: Step size at each checkpoint, `[T]`, or one number for all.

    Returns:
        `[...]`, float32 or better.

    Cost: O(T) per element.

    Source: Pruthi et al. 2020, arXiv:2002.08484.

    Example:
        >>> import torch
        >>> tracin(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), learning_rates=[1.0, 0.5])
        tensor([ 2.5000, -2.0000])
    """
    d = stack("tracin", "dots", dots)
    rates = stack("tracin", "learning_rates", learning_rates)
    if d.dim() == 0 or len(d) == 0 or rates.shape not in ((), d.shape[:1]):
        raise ValueError(
            "tracin: expected dots [T, ...] and learning_rates [T] or one number, got shapes "
            f"{list(d.shape)} and {list(rates.shape)}; pass one entry per checkpoint"
        )
    rates = rates.to(d).expand(len(d))
    return (rates.reshape(-1, *[1] * (d.dim() - 1)) * d).sum(dim=0)
