"""Rules that weigh whole examples by their dot products."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.capture import Across, Factors
from pycoherence.robust._rule import Decision, Per, Rule
from pycoherence.robust._space import GramSpace, Requirement, measure
from pycoherence.robust.centre import Centre
from pycoherence.statistics import Batch


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


class GramRule(Rule):
    """A rule whose result is a sum of the examples' gradients, with weights from dot products.

    Attributes:
        requires: The products of the examples that it chooses by.
    """

    requires: ClassVar[Requirement]
    per: Per

    @property
    def least(self) -> int:
        """The number of examples that it requires."""
        return 1

    @abstractmethod
    def choose(self, space: GramSpace) -> Choice:
        """Weigh the examples of a space, one or more.

        No step may wait for the device. Weights of examples that the space leaves out do not
        count, nor does anything if it keeps fewer than `least`.
        """

    @property
    def carries(self) -> Centre | None:
        """The state that it keeps from one batch to the next."""
        return None

    def mean(self, factors: Factors, share: float, choice: Choice, drop: bool) -> Tensor:
        """The robust mean of one parameter, without centre and noise.

        Args:
            factors: The factors of its gradients.
            share: The gradient `g_b` over its share in the gradient of the loss.
            choice: The result of `decide`.
            drop: The argument that `decide` got.
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


def decide(
    rule: GramRule,
    factors: Mapping[str, Factors],
    centre: Mapping[str, Tensor],
    batch: Batch,
    drop: bool,
    across: Across | None = None,
) -> Choice:
    """Apply a rule to the gradients of some parameters together.

    Args:
        rule: Which.
        factors: The factors of these parameters' gradients.
        centre: The part of the carried centre that belongs to these parameters.
        batch: Its size and share.
        drop: Whether to leave examples out that are not finite; else all weights are NaN.
        across: The part that several processes take together, if the examples are theirs.
    """
    centre_or_none = None if rule.carries is None else centre
    space = measure(factors, batch, rule.requires, centre_or_none, across)
    if not batch.size:
        return Choice(space.sq_norms, torch.ones_like(space.n))
    choice = rule.choose(space)
    if across is not None:
        # A rank with another processor may round otherwise, and choose another example.
        names = [name for name, x in vars(choice).items() if isinstance(x, Tensor)]
        choice = replace(choice, **{name: across.decided(getattr(choice, name)) for name in names})
    enough = space.n >= (rule.least if drop else batch.size)
    weights = torch.where(space.kept, choice.weights, 0.0)
    carried = choice.carried
    return replace(
        choice,
        weights=torch.where(enough, weights, torch.nan),
        carried=None if carried is None else torch.where(enough, carried, torch.nan),
    )
