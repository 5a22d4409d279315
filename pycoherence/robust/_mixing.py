"""Rules that see mixtures of the examples in place of these."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.ops.core.chunks import mirrored
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import NETWORK, CoordinateRule, Per, Rule, State, check_rule
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice, Done
from pycoherence.robust.centre import Centre


class Mixing(GramRule):
    r"""A rule applied to points `\sum_c M_{bc} g_c`.

    Their dot products are `M K M^T`, and the result is a sum of the examples with weights `M^T w`,
    where the inner rule gives the points the weights `w`.

    Attributes:
        rule: The inner rule.
    """

    rule: Rule

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not isinstance(self.rule, (GramRule, CoordinateRule)):
            raise TypeError(
                f"expected a rule over the mixtures' coordinates or dot products inside "
                f"{type(self).__name__}, got {self.rule}, which reads the record of the examples"
            )
        if getattr(self.rule, "noise_multiplier", 0):
            raise ValueError(
                f"expected a rule without noise inside {type(self).__name__}, got {self.rule}: an "
                "example has a part in several points, and may change the result by more than the "
                "noise is made for"
            )

    @abstractmethod
    def mix(self, space: GramSpace) -> Tensor:
        """The matrix `M`, `[points, B]`, float64.

        Examples that the space leaves out have no part in any point. A row of NaN is a point that
        is left out.
        """

    def points(self, n: int) -> int:
        """How many points it makes of `n` examples."""
        return n

    @property
    def per(self) -> Per:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the inner rule: points are mixed from what it looks at together."""
        return self.rule.per if isinstance(self.rule, GramRule) else "network"

    @property
    def requires(self) -> Requirement:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Points lie closer together than examples, so that distances are taken in float64."""
        inner = self.rule.requires if isinstance(self.rule, GramRule) else "gram"
        return "gram" if inner in ("gram", "sq_norms") else "double"

    @property
    def carries(self) -> Centre | None:
        """See `GramRule.carries`."""
        return self.rule.carries if isinstance(self.rule, GramRule) else None

    @property
    def states(self) -> Mapping[str, State]:
        """See `Rule.states`: those of the inner rule."""
        return self.rule.states

    @property
    def order(self) -> tuple[str, float] | None:
        """See `GramRule.order`: that of the inner rule."""
        return self.rule.order if isinstance(self.rule, GramRule) else _aggregate_of(self.rule)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return self.rule.check_batch(self.points(n))

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See `WeightRule.check_parameters`."""
        if isinstance(self.rule, GramRule):
            self.rule.check_parameters(parameters)

    @property
    def expected(self) -> float | None:
        """See `WeightRule.expected`."""
        return self.rule.expected if isinstance(self.rule, GramRule) else None

    def choose_none(self, space: GramSpace) -> Choice:
        """See `GramRule.choose_none`."""
        inner = self.rule if isinstance(self.rule, GramRule) else super()
        return inner.choose_none(space)

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        return self.choose_in(NETWORK, space)

    def choose_in(self, group: str, space: GramSpace) -> Choice:
        """See `GramRule.choose_in`."""
        mixing = self.mix(space)
        points = _mixed(space, mixing)
        parts = mixing.nan_to_num(nan=0.0)
        if not isinstance(self.rule, GramRule):
            weights = torch.where(points.kept, 1 / points.n, 0.0)
            return Choice(weights @ parts, mixing=mixing)
        choice = self.rule.choose_in(group, points)
        choice = choice.settled(points.kept, points.n >= self.rule.least)
        mixed = None if self.rule.order is None else _chosen_points(choice) @ parts
        return Choice(
            choice.weights @ parts,
            choice.carried,
            iterations=choice.iterations,
            clipped=choice.clipped,
            mixing=mixed,
        )

    def mean(self, factors: Factors, share: float, choice: Choice, drop: bool) -> Tensor:
        """See `GramRule.mean`."""
        if self.order is None or choice.mixing is None:  # which no examples have not
            return super().mean(factors, share, choice, drop)
        # Points that are left out show as NaN, and NaN in a point that is not shows as itself.
        found = factors.order_of_mixtures(choice.mixing, *self.order, drop)
        return found * torch.where(choice.weights.isnan().any(), torch.nan, share).to(found.device)

    def end(self, batch: Done) -> None:
        """See `WeightRule.end`."""
        if isinstance(self.rule, GramRule):
            self.rule.end(batch)


def _aggregate_of(rule: Rule) -> tuple[str, float]:
    assert isinstance(rule, CoordinateRule)
    return rule.aggregate


def _mixed(space: GramSpace, mixing: Tensor) -> GramSpace:
    """The space of the points, with the centre of the examples' space."""
    centre = space.gram.new_zeros(len(space.gram) - space.batch_size, len(space.gram))
    centre[:, space.batch_size :].fill_diagonal_(1)
    examples = torch.nn.functional.pad(mixing, (0, len(centre)))
    whole = torch.cat([examples, centre])
    points = GramSpace(mirrored(whole @ space.gram @ whole.mT), len(mixing))
    points.dtype = space.dtype
    return points


def _chosen_points(choice: Choice) -> Tensor:
    """The weights of the points over whose coordinates the inner rule is taken, `[n, points]`."""
    if choice.mixing is not None:
        return choice.mixing
    assert choice.chosen is not None
    chosen = torch.nn.functional.one_hot(choice.chosen.clamp(min=0), len(choice.weights))
    return torch.where(choice.chosen[:, None] < 0, torch.nan, chosen.double())
