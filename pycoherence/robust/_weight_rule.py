"""Rules whose result is a sum of the examples' gradients, with a weight for each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.robust._rule import NETWORK, Decision, Per, Rule, State, check_groups, groups_of
from pycoherence.robust._space import GramSpace
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
        mixing: The points `[points, B]`, float64, over which `GramRule.order` is applied: sums of
            examples with these weights, and none in a row of NaN.
    """

    weights: Tensor
    carried: Tensor | None = None
    chosen: Tensor | None = None
    iterations: Tensor | int | None = None
    clipped: Tensor | None = None
    mixing: Tensor | None = None

    @classmethod
    def none(cls, space: GramSpace) -> "Choice":
        """No choice, since too few examples are kept."""
        return cls(torch.full_like(space.sq_norms, torch.nan))

    @classmethod
    def mean_of(cls, chosen: Tensor, space: GramSpace) -> "Choice":
        """The mean of some examples."""
        weights = torch.zeros_like(space.sq_norms).index_fill_(0, chosen, 1 / max(1, len(chosen)))
        return cls(weights, chosen=chosen)

    def settled(self, kept: Tensor, enough: Tensor) -> "Choice":
        """With weights of zero for examples that are not kept, and NaN if there are not enough."""
        weights = torch.where(enough, torch.where(kept, self.weights, 0.0), torch.nan)
        carried = self.carried
        if carried is not None:
            carried = torch.where(enough, carried, torch.nan)
        return replace(self, weights=weights, carried=carried)

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
        per: Whether the network decides as a whole, each parameter alone, or groups.
    """

    per: Per

    @property
    def least(self) -> int:
        """The number of examples that it requires."""
        return 1

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise unless the rule can be applied to these parameters, before the forward pass."""
        check_groups(self.per, list(parameters))
        if self.carries is not None:
            self.carries.check(parameters)

    @property
    def expected(self) -> float | None:
        """The examples of a step, by which it divides sums; `None` for those of a batch."""
        return None

    def examples(self, batch_size: int) -> float:
        """The number that a sum over the batch is divided by, to be the mean of the rule."""
        return batch_size if self.expected is None else self.expected

    @property
    def carries(self) -> Centre | None:
        """The centre that it keeps from one batch to the next."""
        return None

    @property
    def states(self) -> Mapping[str, State]:
        """See `Rule.states`."""
        return {} if self.carries is None else {"centre": self.carries}

    @property
    def largest_part(self) -> float:
        """The largest `part` of the step's batches before this one, as `end` was told."""
        return 0.0

    def mean(self, factors: Factors, share: float, choice: Choice, drop: bool) -> Tensor:
        """The robust mean of one parameter, without centre and noise.

        Args:
            factors: The factors of its gradients.
            share: The gradient `g_b` over its share in the gradient of the loss.
            choice: The decision of the rule.
            drop: Whether examples that are not finite are left out.
        """
        return factors.weighted_sum((choice.weights * share).to(factors.device))

    def noise(self, parameter: Tensor, groups: Sequence[str]) -> Tensor | None:
        """A plain tensor to add to the sum, of the parameter's shape, in accumulation dtype.

        Args:
            parameter: The parameter that gets it.
            groups: All groups of `per`.
        """
        return None

    def end(self, batch: "Done") -> None:
        """Take note that gradients were made of a batch, before the next one."""


class Done(NamedTuple):
    """A batch whose gradients a rule has made.

    Attributes:
        parameters: Those that got a gradient.
        choices: The choice for each group that took part.
        groups: All groups of `per`.
        size: `B`.
        part: The number that each example's term was multiplied by in the gradient; zero if there
            was none.
        last: Whether the optimizer's step follows, and no other batch of it.
        decided: Makes a random number the same on all processes that take part.
    """

    parameters: Mapping[str, Tensor]
    choices: Mapping[str, Choice]
    groups: Sequence[str]
    size: int
    part: float
    last: bool = True
    decided: Callable[[Tensor], Tensor] = lambda x: x


class Filled(NamedTuple):
    """The result of a rule over whole examples, before noise.

    Attributes:
        means: The robust mean of each parameter that has one, in the units of `g_b`.
        choices: The choice for each parameter.
        by_group: The same for each group of `per`.
        network: The choice for all together, if they are one group.
    """

    means: dict[str, Tensor]
    choices: dict[str, Choice]
    by_group: dict[str, Choice]
    network: Choice | None


def fill(
    rule: WeightRule,
    factors: dict[str, Factors],
    names: Iterable[str],
    share: float,
    drop: bool,
    choose: Callable[[Mapping[str, Factors], Mapping[str, Tensor], str], Choice],
) -> Filled:
    """Apply a rule to the gradients of a batch, group by group.

    Args:
        rule: Which.
        factors: The factors of the parameters' gradients; they are taken out and freed.
        names: The parameters, in the order of the result. One without factors has a mean if the
            carried centre has a part there.
        share: The gradient `g_b` over its share in the gradient of the loss.
        drop: Whether examples that are not finite are left out.
        choose: Gives the choice for the factors of a group, its part of the centre, and its name.
    """
    centre = {} if rule.carries is None else rule.carries.value
    taking = [name for name in names if name in factors or name in centre]
    found = Filled({}, {}, {}, None)
    for group, members in groups_of(rule.per, taking).items():
        mine = {name: factors.pop(name) for name in members if name in factors}
        point = {name: centre[name] for name in members if name in centre}
        choice = found.by_group[group] = choose(mine, point, group)
        for name in members:
            found.choices[name] = choice
            if name in mine:
                found.means[name] = rule.mean(mine.pop(name), share, choice, drop)
            if name in point:
                assert choice.carried is not None
                v = point[name] * choice.carried.to(point[name].device)
                found.means[name] = found.means[name] + v if name in found.means else v
    return found._replace(network=found.by_group.get(NETWORK) if rule.per == NETWORK else None)
