"""Krum and Multi-Krum."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class Krum(GramRule):
    r"""The gradient of the example that is closest to most others, or the mean of the `m` best.

    .. math:: s_i = \sum_{j \in N_i} \lVert g_i - g_j \rVert^2, \qquad
        N_i = \text{the } B - f - 2 \text{ examples nearest to } i

    The `m` examples of the smallest scores `s_i` are averaged; ties go to the earlier example.

    This is the paper's definition: distances are squared once, and an example is not its own
    neighbour. Implementations differ: some take `B - f - 1` neighbours, do not square, square
    twice, or add up the chosen in place of averaging them.

    Give it to `pycoherence.aggregate`. The report has `chosen` and `weights`.

    Args:
        f: How many examples may be arbitrary; `2f + 2 < B`.
        m: How many to average; 1 is Krum, more is Multi-Krum.
        per: Whether the distances are those of whole gradients, or each parameter chooses its own.

    Raises:
        TypeError: A number is not an integer.
        ValueError: `f` is negative, `m` less than one, or `per` unknown; from `backward()`, the
            batch has fewer than `2f + 3` or `m` examples.

    Cost: A backward pass without weight gradients, the Gram matrix, and one weighted sum; memory of
    the inputs and output gradients of all layers. A batch with examples that nearly agree takes its
    Gram matrix again in float64.

    Source: Blanchard et al. 2017, arXiv:1703.02757.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [2.5], [2.75], [1000.0]])
        >>> with pc.aggregate(model, pc.Krum(1)) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad, agg.report.network.chosen
        (tensor([[2.5000]]), tensor([2]))
    """

    f: int
    m: int = 1
    per: Per = "network"

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_int("f")
        self.coerce_int("m", 1)
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if n >= self.least:
            return None
        if self.m > 2 * self.f + 3:
            return f"averages the m = {self.m} best, for which a batch needs as many examples"
        return f"needs a batch of 2f + 3 = {self.least} examples or more"

    @property
    def least(self) -> int:
        """See `WeightRule.least`."""
        return max(2 * self.f + 3, self.m)

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        scores = Neighbours.of(space).scores(self.f)
        chosen = scores.argsort(stable=True)[: self.m]
        weights = torch.zeros_like(scores).index_fill_(0, chosen, 1 / self.m)
        return Choice(weights, chosen=chosen)


@dataclass
class Neighbours:
    """For each example the others, the nearest first.

    Attributes:
        sq_distances: `[B, B - 1]`, infinite to those that are left out.
        examples: Who they are, `[B, B - 1]`.
        left: Which examples there are, `[B]`; the rows of the others do not count.
        n: How many these are, of no dimension.
    """

    sq_distances: Tensor
    examples: Tensor
    left: Tensor
    n: Tensor

    @classmethod
    def of(cls, space: GramSpace) -> "Neighbours":
        """From the distances between all."""
        distances, examples = space.nearest_first
        return cls(distances[:, 1:], examples[:, 1:], space.kept, space.n)

    def scores(self, f: int) -> Tensor:
        """Krum's, the sums over `n - f - 2` neighbours, or over one where these are fewer."""
        most = max(1, self.sq_distances.shape[1] - f - 1)
        nearest = self.sq_distances[:, :most]
        first = torch.arange(most, device=nearest.device) < (self.n - f - 2).clamp(min=1)
        # A last example has no neighbours.
        counts = first[: nearest.shape[1]] & (nearest < torch.inf)
        return torch.where(counts, nearest, 0.0).sum(1).masked_fill(~self.left, torch.inf)

    def without(self, example: Tensor) -> "Neighbours":
        """Without one of several examples."""
        at = (self.examples == example).byte().argmax(1, keepdim=True)
        others = torch.arange(self.examples.shape[1] - 1, device=at.device)
        others = others + (others >= at)
        return Neighbours(
            self.sq_distances.gather(1, others),
            self.examples.gather(1, others),
            self.left.scatter(0, example[None], False),
            self.n - 1,
        )
