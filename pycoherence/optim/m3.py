"""Median of three."""

from typing import ClassVar

from pycoherence.optim.rm3 import RM3


class M3(RM3):
    r"""Gradient descent along the median of three mini-batch gradients, one step every third.

    .. math::
        d_t = \nabla f_t(w) + \lambda w, \qquad
        w \leftarrow w - \eta \, \mathrm{median}(d_t, d_{t-1}, d_{t-2})
        \quad \text{for } t = 3, 6, 9, \dots

    coordinate by coordinate: one large batch in three parts, whose three gradients, unlike those of
    `RM3`, belong to the same weights. It needs three backward passes for each step.

    Everything else is as in `RM3`; the constructor, which they share, describes the arguments.

    Cost: Memory of two gradients between steps; a few reads of them.

    Source: Zielinski, Krishnan and Chatterjee 2020, arXiv:2003.07422.

    Example:
        >>> import torch, pycoherence as pc
        >>> w = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = pc.optim.M3([w], lr=1.0)
        >>> for gradient in (1.0, 100.0, 2.0, 3.0, 3.0):
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> w.data
        tensor([-2.])
    """

    rolls: ClassVar[bool] = False
