"""Rules of other libraries, by the weights that they make of a Gram matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class FromWeighting(GramRule):
    r"""A sum of the examples' gradients, with weights that a function makes of their Gram matrix.

    .. math:: \sum_b w_b g_b, \qquad w = f(K), \quad K_{bc} = \langle g_b, g_c \rangle

    TorchJD's weightings are such functions: `UPGradWeighting()`, `MGDAWeighting()` and the others
    that take a Gramian. With a loss that is the mean of the examples' losses `l_b`, `.grad` becomes
    what TorchJD's aggregator gives for the Jacobian of the `l_b`, the sum of its rows with those
    weights. It is not divided again: `MeanWeighting()` gives the ordinary gradient, and
    `SumWeighting()` `B` times that. With `loss_reduction="sum"` it is `B` times as much, as with
    all rules.

    The matrix comes in float32, or float64 for models in float64, and is exactly symmetric.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `weights`.

    Args:
        weighting: The function: from `K`, `[B, B]`, to the weights `[B]`. It may have state, as
            some of TorchJD's do, and is called once for each batch.
        per: Whether the matrix is that of whole gradients, or each parameter has its own, for which
            the function is called too.

    Raises:
        TypeError: `weighting` cannot be called, or from `backward()`, gives no real tensor.
        ValueError: `per` is unknown, or from `backward()`, the weights are not `[B]`.

    Cost: That of `Krum`, and of the function. If `nonfinite="drop"` leaves examples out, which the
        host waits for, the matrix has only the others.

    Source: Quinton and Rey 2024, arXiv:2406.16232, for weights from a Gramian.

    Example:
        >>> import torch, pycoherence as pc
        >>> rule = pc.FromWeighting(lambda gram: gram.diagonal() / gram.diagonal().sum())
        >>> rule(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([0.2000, 1.6000])
    """

    weighting: Callable[[Tensor], Tensor]
    per: Per = "network"

    requires: ClassVar[Requirement] = "gram"

    def __post_init__(self) -> None:
        if isinstance(self.weighting, type):
            raise TypeError(f"expected an object, got a class; write {self.weighting.__name__}()")
        if not callable(self.weighting):
            raise TypeError(f"expected a function of a Gram matrix, got {self.weighting!r}")
        # One takes the gradients themselves, and would take the matrix for them without an error.
        kind: type = type(self.weighting)
        if any(base.__name__ == "Aggregator" for base in kind.__mro__):
            name = kind.__name__
            raise TypeError(
                f"expected a weighting, which makes weights of a Gram matrix, got the aggregator "
                f"{name}; give its weighting, such as {name}Weighting()"
            )
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        kept, n = space.kept, space.batch_size
        gram = space.gram[:n, :n].to(space.dtype)
        is_whole = bool(kept.all())
        given = gram if is_whole else gram[kept][:, kept]
        if not len(given):
            return Choice.none(space)
        found = self.weighting(given)
        if not isinstance(found, Tensor) or found.is_complex():
            got = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"expected {self} to give a real tensor of weights, got {got}")
        if found.shape != given.shape[:1]:
            raise ValueError(
                f"expected {self} to give {len(given)} weights, one for each example, got shape "
                f"{tuple(found.shape)}"
            )
        weights = torch.zeros_like(space.sq_norms)
        weights[kept] = found.detach().to(weights)
        return Choice(weights)
