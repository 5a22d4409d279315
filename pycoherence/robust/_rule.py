"""The declarations that every robust rule makes of itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from torch import Tensor

Per = Literal["network", "parameter"]


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Decision:
    """The report of a rule on some parameters; `None` where it has no such thing.

    Attributes:
        weights: `[B]`, float64, of a rule that weighs whole examples: the robust mean is
            `sum_b weights_b g_b`, beside the carried centre of `CenteredClip` and the noise of
            `NormClip`; for `Bulyan` the mean over the chosen.
        chosen: Indices of the examples that a choosing rule took, in the order it took them.
        iterations: How many an iterative rule ran.
        clipped: Fraction clipped or cut away: of the values of each coordinate for `Winsorized` and
            `TrimmedMean`, of the examples for `NormClip` and `CenteredClip`.
        kept: Fraction of the coordinates that a rule did not set to zero.
    """

    weights: Tensor | None = None
    chosen: Tensor | None = None
    iterations: int | None = None
    clipped: float | None = None
    kept: float | None = None


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Report:
    """The report of a rule on one batch.

    Attributes:
        batch_size: `B`.
        by_parameter: For each parameter that got a gradient, by name. A rule over the whole network
            has the same decision everywhere.
        network: That decision; `None` for the other rules.
        skipped: Parameters that were left out, and got their ordinary gradient.
    """

    batch_size: int
    by_parameter: Mapping[str, Decision]
    network: Decision | None = None
    skipped: tuple[str, ...] = ()


class Rule(ABC):
    """A robust replacement for the mean of per-example gradients."""

    @abstractmethod
    def check_batch(self, n: int) -> str | None:
        """Why the rule cannot be applied to `n` examples, one or more; `None` if it can."""

    def coerce_int(self, name: str, least: int = 0) -> None:
        """Check a field by `check_count`, and make an `int` of one of NumPy's."""
        object.__setattr__(self, name, check_count(name, getattr(self, name), least))

    def coerce_float(self, name: str, *, positive: bool = True) -> None:
        """Check a field by `check_number`, and make it a `float`."""
        object.__setattr__(self, name, check_number(name, getattr(self, name), positive=positive))


class CoordinateRule(Rule):
    """A rule over the values that the examples have at each coordinate."""

    @property
    @abstractmethod
    def aggregate(self) -> tuple[str, float]:
        """The rule and its `k`, as `pycoherence.ops.linear_order` takes them."""

    @property
    def counts(self) -> bool:
        """Whether it sets coordinates to zero."""
        return False

    def clipped(self, n: int) -> float | None:
        """The fraction of `n` values that it clips or cuts away."""
        return None


def check_count(name: str, value: Any, least: int = 0) -> int:
    """The value as an `int`; raise unless it is an integer of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")
    return int(value)


def check_number(name: str, value: Any, *, positive: bool = True) -> float:
    """The value as a `float`; raise unless it is a number above zero, or not below it."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    number = float(value)
    if not (number > 0 or (number == 0 and not positive)):
        expected = "positive" if positive else "zero or more"
        raise ValueError(f"expected {name} to be {expected}, got {value}")
    return number


def check_per(per: str) -> None:
    """Raise unless it is one of `Per`."""
    if per not in get_args(Per):
        raise ValueError(f"expected per to be 'network' or 'parameter', got {per!r}")


def check_clip(k: int, n: int) -> str | None:
    """Why `k` values on each side of `n` cannot be clipped."""
    if 2 * k < n:
        return None
    return f"clips k = {k} values on each side, for which a batch needs {2 * k + 1} examples"
