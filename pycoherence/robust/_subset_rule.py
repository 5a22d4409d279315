"""Rules that average the set of examples that lie closest together."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_majority, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class SubsetRule(GramRule):
    """The mean of `B - f` examples, chosen on the host."""

    f: int
    per: Per = "network"

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_int("f")
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return check_majority(self.f, n)

    @property
    def least(self) -> int:
        """See `GramRule.least`."""
        return 2 * self.f + 1

    @abstractmethod
    def nearest(self, space: GramSpace, kept: Tensor, size: int) -> list[int]:
        """The places of the `size` closest ones among the examples `kept`."""

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`; it waits for the device."""
        kept = space.kept_indices
        if len(kept) < self.least:
            return Choice.none(space)
        return Choice.mean_of(kept[self.nearest(space, kept, len(kept) - self.f)], space)
