"""Rolling average of three."""

# torch's stubs do not export the operations on lists.
# pyright: reportPrivateImportUsage=false

from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.optim._rolling import Rolling


class RA3(Rolling):
    r"""Gradient descent along the rolling average of three mini-batch gradients: RM3's control.

    .. math::
        d_t = \nabla f_t(w_t) + \lambda w_t, \qquad
        w_{t+1} = w_t - \frac{\eta}{3} \left( d_t + d_{t-1} + d_{t-2} \right)

    A run beside `RM3` tells what the median does from what the larger batch behind each step does.

    Everything else is as in `RM3`; the constructor, which they share, describes the arguments.

    Cost: Memory of two gradients; a few reads of them.

    Source: Zielinski, Krishnan and Chatterjee 2020, arXiv:2003.07422.

    Example:
        >>> import torch, pycoherence as pc
        >>> w = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = pc.optim.RA3([w], lr=1.0)
        >>> for gradient in (1.0, 9.0, 2.0):
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> w.data
        tensor([-4.])
    """

    rolls: ClassVar[bool] = True

    def combine(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """See `Rolling.combine`."""
        return (a + b).add_(c).div_(3)

    def foreach_combine(
        self, a: list[Tensor], b: list[Tensor], c: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """See `Rolling.foreach_combine`."""
        total = torch._foreach_add(a, b)
        torch._foreach_add_(total, c)
        torch._foreach_div_(total, 3)
        return total
