"""Bulyan."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice
from pycoherence.robust.krum import Neighbours


@dataclass(frozen=True)
class Bulyan(GramRule):
    r"""Examples chosen one by one with Krum, then at each coordinate the values near their median.

    Krum chooses one example and is then applied to the others, until `theta = B - 2f` are chosen;
    of their values each coordinate takes the mean of the `theta - 2f` nearest to the median.

    This is the paper's definition over Krum. It asks for `B >= 4f + 3`, but in the last rounds so
    few examples are left that Krum's `n - f - 2` neighbours are none; then the nearest one counts.
    Its authors' AggregaThor stops at `B - 2f - 2` for that reason, and averages several by
    Multi-Krum in each round.

    Give it to `pycoherence.aggregate`. The report has `chosen` and `weights`, those of the mean of
    the chosen.

    Args:
        f: How many examples may be arbitrary.
        per: Whether the distances are those of whole gradients, or each parameter chooses its own.

    Raises:
        TypeError: `f` is not an integer.
        ValueError: `f` is negative, or `per` unknown; from `backward()`, the batch has fewer than
            `4f + 3` examples.

    Cost: That of `Krum`, with `pycoherence.ops.linear_order` over the chosen for the weighted sum,
    and `O(B^3)` numbers compared, which takes seconds from `B = 1024`.

    Source: El Mhamdi et al. 2018, arXiv:1802.07927.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [2.5], [2.75], [3.0], [4.0], [1000.0]])
        >>> with pc.aggregate(model, pc.Bulyan(1)) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the mean of 2, 2.5 and 2.75
        tensor([[2.4167]])
        >>> agg.report.network.chosen
        tensor([3, 1, 4, 2, 0])
    """

    f: int
    per: Per = "network"

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_int("f")
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if n >= self.least:
            return None
        return f"needs a batch of 4f + 3 = {self.least} examples or more"

    @property
    def least(self) -> int:
        """See `WeightRule.least`."""
        return 4 * self.f + 3

    @property
    def order(self) -> tuple[str, float]:
        """See `GramRule.order`."""
        return "meamed", 2 * self.f

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        left, chosen = Neighbours.of(space), list[Tensor]()
        for _ in range(space.batch_size - 2 * self.f):
            if chosen:
                left = left.without(chosen[-1])
            chosen.append(left.scores(self.f).argmin())
        rounds, count = torch.stack(chosen), space.n - 2 * self.f
        runs = torch.arange(len(rounds), device=rounds.device) < count
        weights = torch.zeros_like(space.sq_norms).index_add_(0, rounds, runs / count)
        return Choice(weights, chosen=torch.where(runs, rounds, -1))

    def mean(self, factors: Factors, share: float, choice: Choice, drop: bool) -> Tensor:
        """See `WeightRule.mean`."""
        # How many rows are ordered the host has to know, which it does unless some were left out.
        chosen = choice.decision.chosen if drop else choice.chosen
        if chosen is None:
            return super().mean(factors, share, choice, drop)
        found = factors.order(chosen, *self.order)
        return found * torch.where(choice.weights[0].isnan(), torch.nan, share).to(found.device)
