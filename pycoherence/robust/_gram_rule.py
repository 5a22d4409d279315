"""Rules that weigh whole examples by their dot products."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.robust._rule import Decision, Per, Rule
from pycoherence.robust._space import Needs, Space, measure
from pycoherence.robust.centre import Centre
from pycoherence.statistics import Batch


class Choice(NamedTuple):
    """What a rule makes of `n` examples; its other fields as those of `Decision`.

    Attributes:
        weights: `[n]`, float64.
        carried: Weight of the centre.
    """

    weights: Tensor
    carried: float = 0.0
    chosen: Tensor | None = None
    iterations: int | None = None
    clipped: float | None = None


class GramRule(Rule):
    """A rule whose result is a sum of the examples' gradients, with weights from dot products.

    Attributes:
        needs: What it has to know of the examples.
    """

    needs: ClassVar[Needs]
    per: Per

    @abstractmethod
    def choose(self, space: Space) -> Choice:
        """Weigh the examples of a space, one or more, all of them finite."""

    @property
    def carries(self) -> Centre | None:
        """What it keeps from one batch to the next."""
        return None

    def mean(self, factors: Factors, share: float, decision: Decision) -> Tensor:
        """The robust mean of one parameter, but for centre and noise.

        Args:
            factors: Of its gradients.
            share: The gradient `g_b` over its share in the gradient of the loss.
            decision: As `decide` gave it.
        """
        assert decision.weights is not None
        return factors.weighted_sum(decision.weights * share)

    def noise(self, parameter: Tensor, batch_size: int, parameters: int) -> Tensor | None:
        """What is added to the mean, of the parameter's shape, in accumulation dtype.

        Args:
            parameter: What it is for.
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
) -> tuple[Decision, float]:
    """Apply a rule to the gradients of some parameters together.

    Args:
        rule: Which.
        factors: Of these parameters' gradients.
        centre: What the rule carries of these parameters.
        batch: Its size and share.
        drop: Whether to leave examples out that are not finite; else all weights are NaN.

    Returns:
        What it did, and the weight of the centre.
    """
    space = measure(factors, batch, rule.needs, None if rule.carries is None else centre)
    weights = torch.zeros(batch.size, dtype=torch.float64)
    if not batch.size:
        return Decision(weights), 1.0
    finite = space.sq_norms.isfinite().nonzero().flatten()
    n = len(finite)
    if not n or (n < batch.size and not drop) or rule.refusal(n) is not None:
        return Decision(weights.fill_(torch.nan)), torch.nan
    choice = rule.choose(space if n == batch.size else space.only(finite))
    weights[finite] = choice.weights
    chosen = None if choice.chosen is None else finite[choice.chosen]
    return Decision(weights, chosen, choice.iterations, choice.clipped), choice.carried
