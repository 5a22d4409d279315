"""Rules that weigh whole examples by their dot products."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.capture import Across, Factors
from pycoherence.robust._rule import NETWORK, Report, groups_of
from pycoherence.robust._space import GramSpace, Measured, Requirement, is_short, measure
from pycoherence.robust._vectors import Stack
from pycoherence.robust._weight_rule import Choice, Done, WeightRule, fill
from pycoherence.sites import of_rows
from pycoherence.statistics import Batch


class GramRule(WeightRule):
    """A rule whose result is a sum of the examples' gradients, with weights from dot products.

    Attributes:
        requires: The products of the examples that it chooses by.
    """

    requires: ClassVar[Requirement]

    @property
    def order(self) -> tuple[str, float] | None:
        """The rule and its `k` that it applies to the coordinates of chosen or mixed points.

        They are those of `pycoherence.ops.dense_order`; `None` if the weights tell the result.
        """
        return None

    @abstractmethod
    def choose(self, space: GramSpace) -> Choice:
        """Weigh the examples of a space, one or more.

        No step may wait for the device. Weights of examples that the space leaves out do not
        count, nor does anything if it keeps fewer than `least`.
        """

    def choose_none(self, space: GramSpace) -> Choice:
        """The choice among no examples: it has all that `choose` reports, for one log of both."""
        return Choice(space.sq_norms, torch.ones_like(space.n))

    def choose_in(self, group: str, space: GramSpace) -> Choice:
        """Weigh the examples by their gradients in one group of `per`, as `choose` does."""
        return self.choose(space)

    def combine(
        self, stack: Stack, weights: Tensor | None, drop: bool, outvoted: bool
    ) -> tuple[dict[str, Tensor], Report]:
        """See `Rule.combine`."""
        examples, n = stack.examples, stack.size
        self.check_parameters(examples)
        groups, divisor = list(groups_of(self.per, examples)), self.examples(n)
        factors = {name: Factors.of(of_rows(x)) for name, x in stack.parts.items()}
        choose = partial(decide, self, batch=Batch(n, 1), drop=drop, weights=weights)
        found = fill(self, factors, list(examples), 1, drop, choose)
        means = found.means
        if self.carries is not None:
            self.carries.move(means)
        for name, x in examples.items():
            noise = self.noise(x, groups)
            if noise is not None and not divisor:
                raise ValueError(f"no vectors have no mean for the noise of {self} to be added to")
            if noise is not None:
                means[name] = means[name] + noise / divisor
        part = 1 / divisor if divisor else 0.0
        self.end(Done(examples, found.by_group, groups, n, part))
        network = found.network
        decisions = {name: choice.decision for name, choice in found.choices.items()}
        return means, Report(n, decisions, None if network is None else network.decision)


def decide(
    rule: GramRule,
    factors: Mapping[str, Factors],
    centre: Mapping[str, Tensor],
    group: str = NETWORK,
    *,
    batch: Batch,
    drop: bool,
    across: Across | None = None,
    measured: Measured | None = None,
    weights: Tensor | None = None,
) -> Choice:
    """Apply a rule to the gradients of some parameters together.

    Args:
        rule: Which.
        factors: The factors of these parameters' gradients.
        centre: The part of the carried centre that belongs to these parameters.
        group: The group of `per` that the parameters are.
        batch: Its size and share.
        drop: Whether to leave examples out that are not finite; else all weights are NaN.
        across: The part that several processes take together, if the examples are theirs.
        measured: The outputs that the same pass has measured over the same examples, by parameter.
        weights: How much each example counts, `[B]`, float64; `None` if all count alike.
    """
    centre_or_none = None if rule.carries is None else centre
    space = measure(factors, batch, rule.requires, centre_or_none, across, measured)
    space.weights = None if weights is None else weights.to(space.gram.device)
    space.dtype = torch.float32 if any(map(is_short, factors.values())) else torch.float64
    if not batch.size:
        return rule.choose_none(space)
    choice = rule.choose_in(group, space)
    if across is not None:
        # A rank with another processor may round otherwise, and choose another example.
        names = [name for name, x in vars(choice).items() if isinstance(x, Tensor)]
        choice = replace(choice, **{name: across.decided(getattr(choice, name)) for name in names})
    enough = space.n >= (rule.least if drop else batch.size)
    return choice.settled(space.kept, enough)
