"""Rolling median of three."""

from typing import ClassVar

from torch import Tensor

from pycoherence.optim._median import foreach_median3, median3
from pycoherence.optim._rolling import Rolling


class RM3(Rolling):
    r"""Gradient descent along the rolling median of three mini-batch gradients.

    .. math::
        d_t = \nabla f_t(w_t) + \lambda w_t, \qquad
        w_{t+1} = w_t - \eta \, \mathrm{median}(d_t, d_{t-1}, d_{t-2})

    coordinate by coordinate. A direction that only one of three mini-batches asks for, as examples
    with wrong labels do, moves nothing. So it resists memorization, at the price of plain SGD and
    without per-example gradients. A parameter makes no step until it has its third gradient.

    The median is one of the three numbers exactly. NaN in any of them makes it NaN.

    The constructor, which M3 and RA3 share, describes the arguments and the errors.

    Cost: Memory of two gradients; a few reads of them.

    Source: Zielinski, Krishnan and Chatterjee 2020, arXiv:2003.07422.

    Example:
        >>> import torch, pycoherence as pc
        >>> w = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = pc.optim.RM3([w], lr=1.0)
        >>> for gradient in (1.0, 100.0, 2.0):
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> w.data
        tensor([-2.])
    """

    rolls: ClassVar[bool] = True

    def combine(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """See `Rolling.combine`."""
        return median3(a, b, c)

    def foreach_combine(
        self, a: list[Tensor], b: list[Tensor], c: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Rolling.foreach_combine`."""
        return foreach_median3(a, b, c)
