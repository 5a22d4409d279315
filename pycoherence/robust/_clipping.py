"""Rules that bound the part of each example, and add noise for differential privacy."""

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._noise import Normal
from pycoherence.robust._rule import NETWORK, Per, check_number, check_per, groups_of
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice, Done

Limit = float | Tensor
"""The largest norm that is left, a number or a tensor of no dimension."""


class Unfinished:
    """The parameters, while batches of a step have been added up that got no noise yet.

    Attributes:
        largest_part: The largest number that an example's term was multiplied by in them.
    """

    def __init__(self) -> None:
        self._versions: list[tuple[weakref.ref[Tensor], int]] = []
        self.largest_part = 0.0

    def __reduce__(self) -> Any:
        return Unfinished, ()  # a copy is for other parameters

    def add(self, parameters: Mapping[str, Tensor], part: float) -> None:
        """Remember the parameters as they are, and a batch's `part`."""
        self.largest_part = max(self.largest_part, part)
        self._versions = [(weakref.ref(p), p._version) for p in parameters.values()]

    def end(self) -> None:
        """Forget them, since the step got its noise."""
        self._versions, self.largest_part = [], 0.0

    def check(self) -> None:
        """Raise `RuntimeError` if the parameters have moved since, and thus without noise."""
        found = [(ref(), version) for ref, version in self._versions]
        if any(p is not None and p._version != version for p, version in found):
            self.end()
            raise RuntimeError(
                "the parameters have changed after a batch with last=False, so that the noise of "
                "that step was never added; give last=True to the last batch before each "
                "optimizer.step(), also at the end of an epoch"
            )


@dataclass(frozen=True)
class Clipping(GramRule):
    """A mean of the examples' gradients, made so short that noise can hide any of them."""

    max_norm: float | Mapping[str, float]
    noise_multiplier: float = 0.0
    generator: torch.Generator | Normal | None = None
    per: Per = "network"
    expected_batch_size: float | None = field(default=None, kw_only=True)
    unfinished: Unfinished = field(
        default_factory=Unfinished, init=False, compare=False, repr=False
    )

    requires: ClassVar[Requirement] = "sq_norms"

    def __post_init__(self) -> None:
        check_per(self.per)
        self._coerce_max_norm()
        self.coerce_float("noise_multiplier", positive=False)
        given = self.generator
        if given is not None and not isinstance(given, torch.Generator) and not callable(given):
            raise TypeError(
                "expected a torch.Generator or a function such as pc.secure_normal, got "
                f"{type(given).__name__}"
            )
        if self.expected_batch_size is not None:
            self.coerce_float("expected_batch_size")

    def _coerce_max_norm(self) -> None:
        given = self.max_norm
        if not isinstance(given, Mapping):
            self.coerce_float("max_norm")
            return
        norms = {group: check_number(f"max_norm of {group}", c) for group, c in given.items()}
        object.__setattr__(self, "max_norm", norms)
        if self.per == NETWORK:
            raise ValueError(
                f"expected one max_norm with per='network', got {norms}; name the groups in per"
            )
        if not isinstance(self.per, str):
            self._check_limits(list(self.per))

    def _check_limits(self, groups: Sequence[str]) -> None:
        if isinstance(self.max_norm, Mapping) and set(self.max_norm) != set(groups):
            raise ValueError(
                f"expected max_norm for the groups {', '.join(groups)} of per, got it for "
                f"{', '.join(self.max_norm)}"
            )

    @abstractmethod
    def multipliers(self, norms: Tensor, limit: Limit) -> Tensor:
        """The numbers that the examples' gradients are multiplied by, from their norms."""

    def clipped(self, norms: Tensor, limit: Limit) -> Tensor | None:
        """The fraction of the examples beyond the limit."""
        return (norms > limit).double().sum() / len(norms)

    def limit(self, group: str) -> Limit:
        """The largest norm that is left in one group."""
        return self.max_norm[group] if isinstance(self.max_norm, Mapping) else self.max_norm

    def noise_of(self, groups: int) -> float:
        """The standard deviation of the noise over the norm of all limits."""
        return self.noise_multiplier

    @property
    def weighs(self) -> bool:
        """See `Rule.weighs`: the mean may be a weighted one, unless noise fits its divisor."""
        return not self.noise_multiplier and self.expected_batch_size is None

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See `WeightRule.check_parameters`."""
        super().check_parameters(parameters)
        if self.per == "parameter":
            self._check_limits(list(groups_of(self.per, parameters)))
        self.unfinished.check()

    @property
    def expected(self) -> float | None:
        """See `WeightRule.expected`."""
        return self.expected_batch_size

    @property
    def largest_part(self) -> float:
        """See `WeightRule.largest_part`."""
        return self.unfinished.largest_part

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        return self.choose_in(NETWORK, space)

    def choose_none(self, space: GramSpace) -> Choice:
        """See `GramRule.choose_none`."""
        return replace(super().choose_none(space), clipped=self.clipped(space.sq_norms, 1.0))

    def choose_in(self, group: str, space: GramSpace) -> Choice:
        """See `GramRule.choose_in`."""
        norms, limit = space.sq_norms.sqrt(), self.limit(group)
        weights = self.multipliers(norms, limit)
        if space.weights is None:
            weights = weights / self.examples(space.batch_size)
        else:
            weights = weights * (space.weights / space.weights.sum())
        return Choice(weights, clipped=self.clipped(norms, limit))

    def noise(self, parameter: Tensor, groups: Sequence[str]) -> Tensor | None:
        """See `WeightRule.noise`."""
        if not self.noise_multiplier:
            return None
        dtype, device = accumulate_dtype(parameter.dtype), parameter.device
        # One example moves the gradient of each group by no more than its limit.
        total = sum(self.limit(group) ** 2 for group in groups) ** 0.5
        return self.normal(parameter.shape, dtype, device) * (total * self.noise_of(len(groups)))

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal numbers."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return torch.randn(shape, generator=self.generator, dtype=dtype, device=device)
        found = self.generator(tuple(shape), dtype, device)
        if (found.shape, found.dtype, found.device.type) != (tuple(shape), dtype, device.type):
            raise ValueError(
                f"expected {tuple(shape)} numbers in {dtype} on {device} from the generator, got "
                f"{tuple(found.shape)} in {found.dtype} on {found.device}"
            )
        return found

    def end(self, batch: Done) -> None:
        """See `WeightRule.end`."""
        if batch.last:
            self.unfinished.end()
        elif self.noise_multiplier:
            self.unfinished.add(batch.parameters, batch.part)
