"""Rules whose result is a sum of the examples' gradients, with a weight for each."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.robust._rule import Decision, Per, Rule
from pycoherence.robust.centre import Centre


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Choice:
    """The decision of a rule on the examples, on the device of their gradients.

    Attributes:
        weights: `[B]`, float64; NaN where there is no choice.
        carried: Weight of the centre, of no dimension.
        chosen: Indices of examples; those below zero do not count.
        iterations: How many, of no dimension.
        clipped: The fraction that `Decision` reports, a tensor `[]`.
    """

    weights: Tensor
    carried: Tensor | None = None
    chosen: Tensor | None = None
    iterations: Tensor | int | None = None
    clipped: Tensor | None = None

    @cached_property
    def decision(self) -> Decision:
        """For people: what is read of it waits for the device."""
        weights = self.weights.cpu()
        if weights.isnan().any():
            return Decision(weights)
        chosen = None if self.chosen is None else self.chosen.cpu()
        return Decision(
            weights,
            None if chosen is None else chosen[chosen >= 0],
            None if self.iterations is None else int(self.iterations),
            None if self.clipped is None else float(self.clipped),
        )


class WeightRule(Rule):
    """A rule that weighs whole examples.

    Attributes:
        per: Whether the network decides as a whole, or each parameter alone.
    """

    per: Per

    @property
    def least(self) -> int:
        """The number of examples that it requires."""
        return 1

    @property
    def carries(self) -> Centre | None:
        """The state that it keeps from one batch to the next."""
        return None

    def mean(self, factors: Factors, share: float, choice: Choice, drop: bool) -> Tensor:
        """The robust mean of one parameter, without centre and noise.

        Args:
            factors: The factors of its gradients.
            share: The gradient `g_b` over its share in the gradient of the loss.
            choice: The decision of the rule.
            drop: Whether examples that are not finite are left out.
        """
        return factors.weighted_sum((choice.weights * share).to(factors.device))

    def noise(self, parameter: Tensor, batch_size: int, parameters: int) -> Tensor | None:
        """A plain tensor to add to the mean, of the parameter's shape, in accumulation dtype.

        Args:
            parameter: The parameter that gets it.
            batch_size: `B`.
            parameters: How many there are.
        """
        return None
