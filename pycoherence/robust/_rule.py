"""The declarations that every robust rule makes of itself."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, Protocol, get_args, overload

import torch
from torch import Tensor

from pycoherence.capture import outvoted_in
from pycoherence.ops.dense_order import dense_order
from pycoherence.ops.family.rules import RULES
from pycoherence.robust._vectors import Stack, Vectors, check_weights
from pycoherence.sites import of_rows
from pycoherence.tables import Printed, plain, table

_CLIPPING = (
    "expected a rule that clips values or cuts them away with outvoted=True: Winsorized, "
    "TrimmedMean, Phocas or MeaMed"
)

Per = Literal["network", "parameter"] | Mapping[str, Sequence[str]]
"""The parameters that are decided on together: all, each alone, or groups.

Groups are patterns of parameter names, such as `{"head": ["fc.*"], "rest": ["*"]}`, where `*` is
any text and `?` any character. A parameter is in the first group that has a pattern for it.
"""

NETWORK = "network"
"""The group of all parameters."""

NonFinite = Literal["nan", "drop"]


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Decision:
    """The report of a rule on some parameters; `None` where it has no such thing.

    `print` shows the least and the largest of the weights, and the first of the chosen.

    Attributes:
        weights: `[B]`, float64, of a rule that weighs whole examples: the robust mean is
            `sum_b weights_b g_b`, beside the carried centre of `CenteredClip` and the noise of
            `NormClip`; for `Bulyan` the mean over the chosen, and for a rule over coordinates of
            mixtures, such as `NNM(f, Median())`, the mean of these.
        chosen: Indices of the examples that a choosing rule took, in the order it took them.
        iterations: How many an iterative rule ran.
        clipped: Fraction clipped or cut away: of the values of each coordinate for `Winsorized` and
            `TrimmedMean`, of the examples for `NormClip` and `CenteredClip`. NaN of none.
        kept: Fraction of the coordinates that a rule did not set to zero.
        outvoted: `[B]`, float64, with `outvoted=True`: the share of the coordinates in which the
            value of each example was clipped or cut away. It lay beyond all that the rule left as
            they were; a value that equals one of these was not outvoted.
    """

    weights: Tensor | None = None
    chosen: Tensor | None = None
    iterations: int | None = None
    clipped: float | None = None
    kept: float | None = None
    outvoted: Tensor | None = None

    def __repr__(self) -> str:
        told = [f"{name}={_short(value)}" for name, value in self.known().items()]
        return f"Decision({', '.join(told)})"

    def known(self) -> dict[str, Any]:
        """All that the rule has said, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, which `json` can write."""
        return plain(self.known())


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Report(Printed):
    """The report of a rule on one batch.

    `print` shows a table: the network, or the parameters of a rule that decides for each.

    Attributes:
        batch_size: `B`.
        by_parameter: For each parameter that got a gradient, by name. A rule over the whole network
            has the same decision everywhere.
        network: That decision; `None` for the other rules.
        skipped: Parameters that were left out, and got their ordinary gradient.
        outvoted: `[B]`, the share over the coordinates of all parameters; see `Decision`.
    """

    batch_size: int
    by_parameter: Mapping[str, Decision]
    network: Decision | None = None
    skipped: tuple[str, ...] = ()
    outvoted: Tensor | None = None

    def __repr__(self) -> str:
        n = len(self.by_parameter)
        whole = "" if self.network is None else f", network={self.network!r}"
        return f"Report(batch_size={self.batch_size}, parameters={n}{whole})"

    def __str__(self) -> str:
        parts = self.by_parameter if self.network is None else {"network": self.network}
        known = {name: each.known() for name, each in parts.items()}
        names = [f.name for f in fields(Decision) if any(f.name in each for each in known.values())]
        title = f"Report on {self.batch_size} examples, {len(self.by_parameter)} parameters"
        if self.skipped:
            title += f", {len(self.skipped)} skipped"
        if not names:
            return f"{title}; the rule says nothing more"
        return table(
            title,
            names,
            {"": known},
            lambda each: [_short(each[name]) if name in each else "-" for name in names],
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, which `json` can write."""
        network = None if self.network is None else self.network.to_dict()
        by_parameter = {name: each.to_dict() for name, each in self.by_parameter.items()}
        return {
            "batch_size": self.batch_size,
            "network": network,
            "by_parameter": by_parameter,
            "skipped": list(self.skipped),
            "outvoted": plain(self.outvoted),
        }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _short(value: Any) -> str:
    """A number, or what there is to say of many."""
    if not isinstance(value, Tensor):
        return f"{value:.4g}"
    if value.is_floating_point():
        return f"{value.min():.3g} to {value.max():.3g}" if value.numel() else "none"
    first = ", ".join(map(str, value[:4].tolist()))
    return f"[{first}]" if len(value) <= 4 else f"[{first}, ... {len(value) - 4} more]"


class State(Protocol):
    """A part of a rule that batches move."""

    def state_dict(self) -> dict[str, Any]:
        """A copy, for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace it by what `state_dict` gave."""
        ...


class Rule(ABC):
    """A robust replacement for the mean of per-example gradients, or of other vectors."""

    @abstractmethod
    def check_batch(self, n: int) -> str | None:
        """Why the rule cannot be applied to `n` examples, one or more; `None` if it can."""

    @property
    def weighs(self) -> bool:
        """Whether vectors may have weights, so that some count more than others."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the rule carries from one step to the next, for a checkpoint.

        Returns:
            The `"centre"` of `CenteredClip`, the `"threshold"` of `AdaptiveClip`, those of
            the rule inside a mixing one, and nothing for others.
        """
        return {name: part.state_dict() for name, part in self.states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace it by what `state_dict` of a rule of this kind gave.

        Raises:
            ValueError: It is something else.
        """
        mine = self.states
        if set(state) != set(mine):
            raise ValueError(
                f"expected the state of a rule such as {self}, with {_listed(mine)}, got one with "
                f"{_listed(state)}; give what state_dict() of such a rule gave"
            )
        for name, part in mine.items():
            part.load_state_dict(state[name])

    @property
    def states(self) -> Mapping[str, State]:
        """The states that it carries from one batch to the next, for checkpoints, by name."""
        return {}

    @overload
    def __call__(
        self,
        vectors: Tensor | Sequence[Tensor],
        *,
        weights: Tensor | Sequence[float] | None = None,
        nonfinite: NonFinite = "nan",
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        vectors: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        weights: Tensor | Sequence[float] | None = None,
        nonfinite: NonFinite = "nan",
    ) -> dict[str, Tensor]: ...
    def __call__(
        self,
        vectors: Vectors,
        *,
        weights: Tensor | Sequence[float] | None = None,
        nonfinite: NonFinite = "nan",
    ) -> Any:
        r"""Apply the rule to vectors of any kind, without a model.

        .. math:: \operatorname{rule}(v_1, \dots, v_n)

        in place of their mean, as `pycoherence.aggregate` applies it to gradients `v_b = g_b`.
        Named parts of a vector, such as those of a state dict, are the parameters of a model: norms
        and distances are those of whole vectors, or with `per="parameter"` of each part.

        Parts of whole numbers or bools, such as `num_batches_tracked`, do not point anywhere. They
        take no part in the rule; the result has the lower median that they have at each coordinate.
        All floating parts take part, running means and variances too.

        Args:
            vectors: `[n, ...]`, one vector in each row; a dict of such tensors by name; a list of
                `n` tensors of one shape; or a list of `n` dicts of tensors, such as state dicts.
                float16/bfloat16/float32/float64, any strides. No gradient flows through.
            weights: `[n]`, zero or more: how much each vector counts, in any unit. `None` for equal
                ones. `GeometricMedian` and `CenteredClip` take them, and rules that clip norms
                without noise.
            nonfinite: The treatment of numbers that are not finite, as in `pycoherence.aggregate`.

        Returns:
            One vector in their structure: a tensor `[...]`, or a dict of tensors, of the same
            dtypes.

        Raises:
            ValueError: There are too few vectors for the rule, they do not fit each other, or the
                rule does not take such weights.
            TypeError: They are not dense tensors of one of these kinds.

        Cost: That of `pycoherence.ops.dense_order` for a rule over coordinates; for one over whole
            vectors that of `pycoherence.ops.dense_gram` and a weighted sum. A tensor or a dict of
            tensors is read as it lies; lists are copied once.

        Source: That of the rule.

        Example:
            >>> import torch, pycoherence as pc
            >>> matrix = torch.tensor([[1.0, 5.0], [2.0, 6.0], [4.0, 9.0], [900.0, -90.0]])
            >>> pc.Median()(matrix)
            tensor([3.0000, 5.5000])
            >>> clients = [torch.nn.Linear(2, 1).state_dict() for _ in range(5)]
            >>> merged = pc.GeometricMedian()(clients, weights=[10, 10, 20, 5, 5])
            >>> merged["weight"].shape
            torch.Size([1, 2])
        """
        return self.with_report(vectors, weights=weights, nonfinite=nonfinite)[0]

    def with_report(
        self,
        vectors: Vectors,
        *,
        weights: Tensor | Sequence[float] | None = None,
        nonfinite: NonFinite = "nan",
        outvoted: bool = False,
    ) -> "tuple[Any, Report]":
        """Apply the rule to vectors, and say what it did.

        Args:
            vectors: The argument of a call, like the next two.
            weights: See there.
            nonfinite: See there.
            outvoted: Whether the report says in what share of the coordinates each vector was
                clipped or cut away, as in `pycoherence.aggregate`.

        Returns:
            The vector that a call returns, and the `Report`. Its `by_parameter` has the names of
            the vectors' parts, or `"vector"` alone if they have none.

        Raises:
            ValueError: See a call.
            TypeError: See a call.

        Example:
            >>> import torch, pycoherence as pc
            >>> matrix = torch.tensor([[1.0], [2.0], [2.5], [2.75], [1000.0]])
            >>> found, report = pc.Krum(1).with_report(matrix)
            >>> found, report.network.chosen
            (tensor([2.5000]), tensor([2]))
        """
        check_nonfinite(nonfinite)
        if outvoted:
            self.check_outvoted()
        stack = Stack.of(vectors)
        why = self.check_batch(stack.size) if stack.size else None
        if why is not None:
            raise ValueError(
                f"{self} {why}, got {stack.size}; give it more vectors, or change the rule"
            )
        given = None
        if weights is not None:
            if not self.weighs:
                raise ValueError(
                    f"{self} counts all vectors alike; leave weights out, or take a rule for which "
                    "they mean something, such as pc.GeometricMedian()"
                )
            given = check_weights(weights, stack.size, next(iter(stack.parts.values())).device)
        with torch.no_grad():
            found, report = self.combine(stack, given, nonfinite == "drop", outvoted)
        return stack.restored(found), report

    def check_outvoted(self) -> None:
        """Raise `ValueError` unless it can be said in which coordinates examples are outvoted."""
        raise ValueError(
            f"{_CLIPPING}, got {self}; of a rule over whole examples the report has the weights"
        )

    @abstractmethod
    def combine(
        self, stack: Stack, weights: Tensor | None, drop: bool, outvoted: bool
    ) -> "tuple[dict[str, Tensor], Report]":
        """The result for each floating part of vectors, and the report.

        Args:
            stack: The vectors; enough of them.
            weights: `[n]`, float64, if the rule `weighs`.
            drop: Whether those that are not finite are left out.
            outvoted: Whether the report says who was outvoted, if the rule can.
        """

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

    def check_outvoted(self) -> None:
        """Raise `ValueError` if the rule clips no values and cuts none away."""
        if RULES[self.aggregate[0]].kept is None:
            raise ValueError(f"{_CLIPPING}, got {self}")

    def combine(
        self, stack: Stack, weights: Tensor | None, drop: bool, outvoted: bool
    ) -> tuple[dict[str, Tensor], Report]:
        """See `Rule.combine`."""
        name_of_rule, k = self.aggregate
        nonfinite, parts, n = "drop" if drop else "nan", stack.parts, stack.size
        found = {
            name: dense_order(x, name_of_rule, k, nonfinite=nonfinite) for name, x in parts.items()
        }
        counts = {
            name: outvoted_in(of_rows(x), n, name_of_rule, k, drop)
            for name, x in parts.items()
            if outvoted and n
        }
        nonzero = {name: x.count_nonzero() if self.counts else None for name, x in found.items()}
        numbers = {name: x.numel() for name, x in found.items()}
        return found, self.report(n, numbers, nonzero, counts)

    def report(
        self,
        n: int,
        numbers: Mapping[str, int],
        nonzero: Mapping[str, Tensor | None],
        outvoted: Mapping[str, Tensor],
        skipped: tuple[str, ...] = (),
    ) -> Report:
        """The report on some parameters.

        Args:
            n: How many examples there were.
            numbers: How many coordinates each parameter has.
            nonzero: How many of the result are not zero, if the rule `counts`.
            outvoted: In how many each example was clipped or cut away, `[n]`, if that was asked
                for.
            skipped: Parameters that were left out.
        """
        clipped = self.clipped(max(1, n))
        if not n and clipped is not None:
            clipped = math.nan
        out = {name: count.cpu() for name, count in outvoted.items()}
        decisions: dict[str, Decision] = {}
        for name, count in nonzero.items():
            whole = max(1, numbers[name])
            kept = None if count is None else count.item() / whole
            share = out[name] / whole if name in out else None
            decisions[name] = Decision(clipped=clipped, kept=kept, outvoted=share)
        total = None
        if out:
            total = torch.stack(list(out.values())).sum(0) / max(1, sum(numbers[n] for n in out))
        return Report(n, decisions, skipped=skipped, outvoted=total)


def check_nonfinite(nonfinite: str) -> None:
    """Raise unless it is one of `NonFinite`."""
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"expected nonfinite to be 'nan' or 'drop', got {nonfinite!r}")


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


def check_per(per: Any) -> None:
    """Raise unless it is one of `Per`."""
    if isinstance(per, str):
        if per not in ("network", "parameter"):
            raise ValueError(
                "expected per to be 'network' or 'parameter', or groups of parameter names such "
                f"as {{'head': ['fc.*'], 'rest': ['*']}}, got {per!r}"
            )
        return
    fits = isinstance(per, Mapping) and all(
        isinstance(name, str)
        and isinstance(patterns, Sequence)
        and not isinstance(patterns, str)
        and all(isinstance(pattern, str) for pattern in patterns)
        for name, patterns in per.items()
    )
    if not fits:
        raise TypeError(
            "expected the groups of per as lists of parameter names by the name of the group, "
            f"such as {{'head': ['fc.*'], 'rest': ['*']}}, got {per!r}"
        )


def groups_of(per: Per, names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each group that has some, by the name of the group."""
    if per == "parameter":
        return {name: [name] for name in names}
    patterns = {NETWORK: ["*"]} if isinstance(per, str) else per
    found: dict[str, list[str]] = {group: [] for group in patterns}
    for name in names:
        group = _group_of(name, patterns)
        if group is None:
            raise ValueError(
                f"expected a group of per for each parameter, got none for {name!r} in "
                f"{dict(patterns)}; add a last group ['*'] for the rest, or freeze the parameter"
            )
        found[group].append(name)
    return {group: mine for group, mine in found.items() if mine}


def check_groups(per: Per, names: Sequence[str]) -> None:
    """Raise `ValueError` unless the groups have each parameter, and each pattern is one of some."""
    groups_of(per, names)
    patterns = [] if isinstance(per, str) else [p for group in per.values() for p in group]
    idle = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if idle:
        raise ValueError(
            f"expected names of trained parameters in the groups of per, got "
            f"{', '.join(map(repr, idle))}; the parameters are {', '.join(names)}"
        )


def _group_of(name: str, patterns: Mapping[str, Sequence[str]]) -> str | None:
    for group, mine in patterns.items():
        if any(fnmatchcase(name, pattern) for pattern in mine):
            return group
    return None


def check_majority(f: int, n: int) -> str | None:
    """Why `f` of `n` examples cannot be arbitrary where the others have to be more."""
    return None if 2 * f < n else f"needs a batch of 2f + 1 = {2 * f + 1} examples or more"


def check_rule(rule: Any) -> None:
    """Raise `TypeError` unless it is a rule."""
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"expected an object, got a class; write pc.{rule.__name__}(...)")
    if not isinstance(rule, Rule):
        raise TypeError(
            f"expected a rule such as pc.Winsorized(2), got {rule!r}; pc.FromWeighting(...) and "
            "pc.Reweight(...) make rules of functions"
        )


def check_clip(k: int, n: int) -> str | None:
    """Why `k` values on each side of `n` cannot be clipped."""
    if 2 * k < n:
        return None
    return f"clips k = {k} values on each side, for which a batch needs {2 * k + 1} examples"
