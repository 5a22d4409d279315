"""Geometric median."""

from dataclasses import dataclass, replace
from typing import ClassVar

from pycoherence.ops.gram_median import gram_median, weiszfeld
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class GeometricMedian(GramRule):
    r"""The point whose distances to the examples' gradients add up to the least.

    .. math:: \arg\min_z \sum_b \lVert g_b - z \rVert, \qquad
        z \leftarrow \frac{\sum_b \beta_b g_b}{\sum_b \beta_b}, \quad
        \beta_b = \frac{1}{\max(\nu, \lVert g_b - z \rVert)}

    by the smoothed Weiszfeld algorithm of the paper, from the mean. Implementations that start from
    zero, or take a `nu` as large as 0.1, stop elsewhere.

    Give it to `pycoherence.aggregate`. The report has `weights` and `iterations`.

    Args:
        iterations: How many at most. They cost `O(B^2)` each, whatever the network.
        nu: Smallest distance, in the units of `||g_b||`.
        tolerance: Stop when the sum of the distances changes by no more than this share of it.
        per: Whether the distances are those of whole gradients, or each parameter has its own
            median.

    Raises:
        TypeError: An argument is not a number.
        ValueError: `iterations` is less than one, `nu` not positive, `tolerance` negative, or `per`
            unknown.

    Cost: That of `Krum`.

    Source: Pillutla et al. 2019, arXiv:1912.13445.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 900.0]])
        >>> with pc.aggregate(model, pc.GeometricMedian()):
        ...     model(x).mean().backward()
        >>> model.weight.grad.norm() < 1
        tensor(True)
    """

    iterations: int = 100
    nu: float = 1e-6
    tolerance: float = 1e-6
    per: Per = "network"

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_int("iterations", 1)
        self.coerce_float("nu")
        self.coerce_float("tolerance", positive=False)
        check_per(self.per)

    @property
    def weighs(self) -> bool:
        """See `Rule.weighs`: the sum of the distances may be a weighted one, as in the paper."""
        return True

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def choose_none(self, space: GramSpace) -> Choice:
        """See `GramRule.choose_none`."""
        return replace(super().choose_none(space), iterations=0)

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        how = self.nu, self.tolerance, self.iterations
        if space.weights is None:
            weights, iterations = gram_median(space.gram, space.kept, *how)
        else:
            weights, iterations = weiszfeld(space.gram, space.shares, *how)
        return Choice(weights, iterations=iterations)
