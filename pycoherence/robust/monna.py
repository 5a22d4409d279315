"""MoNNA."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_majority, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class MoNNA(GramRule):
    r"""The mean of one trusted example and its nearest neighbours.

    .. math:: \frac{1}{B - f} \sum_{b \in S} g_b, \qquad
        S = \text{the } B - f \text{ examples nearest to } g_t

    which `g_t` itself is one of. In the paper each worker trusts its own gradient. Ties go to the
    earlier example.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `chosen`, the nearest
    first, and `weights`.

    Args:
        f: How many examples may be arbitrary; `2f < B`.
        trusted: `t`, the index of an example, from 0.
        per: Whether the distances are those of whole gradients, or each parameter chooses its own.

    Raises:
        TypeError: A number is not an integer.
        ValueError: `f` or `trusted` is negative, or `per` unknown; from `backward()`, the batch has
            fewer than `2f + 1` or `t + 1` examples.

    Cost: That of `Krum`. If `nonfinite="drop"` leaves the trusted example out, the result is NaN.

    Source: Farhadkhani et al. 2022, arXiv:2209.10931.

    Example:
        >>> import torch, pycoherence as pc
        >>> vectors = torch.tensor([[1.0], [2.0], [4.0], [90.0], [-3.0]])
        >>> found, report = pc.MoNNA(2, trusted=1).with_report(vectors)
        >>> found, report.network.chosen
        (tensor([2.3333]), tensor([1, 0, 2]))
    """

    f: int
    trusted: int = 0
    per: Per = "network"

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_int("f")
        self.coerce_int("trusted")
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if self.trusted >= n:
            return f"trusts example {self.trusted}, for which a batch needs {self.trusted + 1}"
        return check_majority(self.f, n)

    @property
    def least(self) -> int:
        """See `GramRule.least`."""
        return 2 * self.f + 1

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        order = space.nearest_first[1][self.trusted]
        count = space.n - self.f
        runs = torch.arange(len(order), device=order.device) < count
        weights = torch.zeros_like(space.sq_norms).index_add_(0, order, runs / count)
        weights = torch.where(space.kept[self.trusted], weights, torch.nan)
        return Choice(weights, chosen=torch.where(runs, order, -1))
