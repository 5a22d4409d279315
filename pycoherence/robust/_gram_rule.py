"""Rules that weigh whole examples by their dot products."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.capture import Across, Factors
from pycoherence.robust._rule import NETWORK
from pycoherence.robust._space import GramSpace, Requirement, measure
from pycoherence.robust._weight_rule import Choice, WeightRule
from pycoherence.statistics import Batch


class GramRule(WeightRule):
    """A rule whose result is a sum of the examples' gradients, with weights from dot products.

    Attributes:
        requires: The products of the examples that it chooses by.
    """

    requires: ClassVar[Requirement]

    @abstractmethod
    def choose(self, space: GramSpace) -> Choice:
        """Weigh the examples of a space, one or more.

        No step may wait for the device. Weights of examples that the space leaves out do not
        count, nor does anything if it keeps fewer than `least`.
        """

    def choose_in(self, group: str, space: GramSpace) -> Choice:
        """Weigh the examples by their gradients in one group of `per`, as `choose` does."""
        return self.choose(space)


def decide(
    rule: GramRule,
    factors: Mapping[str, Factors],
    centre: Mapping[str, Tensor],
    batch: Batch,
    drop: bool,
    across: Across | None = None,
    group: str = NETWORK,
) -> Choice:
    """Apply a rule to the gradients of some parameters together.

    Args:
        rule: Which.
        factors: The factors of these parameters' gradients.
        centre: The part of the carried centre that belongs to these parameters.
        batch: Its size and share.
        drop: Whether to leave examples out that are not finite; else all weights are NaN.
        across: The part that several processes take together, if the examples are theirs.
        group: The group of `per` that the parameters are.
    """
    centre_or_none = None if rule.carries is None else centre
    space = measure(factors, batch, rule.requires, centre_or_none, across)
    if not batch.size:
        return Choice(space.sq_norms, torch.ones_like(space.n))
    choice = rule.choose_in(group, space)
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
