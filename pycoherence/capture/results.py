"""The results of a backward pass: plain tensors, without the pass, the model or its graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycoherence.ops.dense_order import dense_order
from pycoherence.ops.family.rules import outvoted
from pycoherence.sites import Layout, ShardedSite, Site, is_dtensor, norm_numbers


class ParameterInfo(NamedTuple):
    """The facts of a parameter that outlive it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None = None

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Zeros of its shape, distributed as it is."""
        if self.layout is not None:
            return self.layout.zeros(dtype, self.device)
        return torch.zeros(self.shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Factors:
    """A site without its graph, and what its tensors were when it was kept.

    Attributes:
        site: The factors.
        versions: How often each tensor had been changed in place.
    """

    site: Site
    versions: dict[str, int]

    @classmethod
    def of(cls, site: Site) -> "Factors":
        """Keep the factors of a site."""
        detached = {name: x.detach() for name, x in site.tensors().items()}
        versions = {name: x._version for name, x in detached.items()}
        return cls(site.with_tensors(detached), versions)

    def __getstate__(self) -> dict[str, Any]:
        return {"site": self.site, "changed": self.changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Tensors that were copied, or written to a file, begin with versions of their own.
        versions = {name: x._version for name, x in state["site"].tensors().items()}
        if state["changed"]:
            versions = {name: n - 1 for name, n in versions.items()}
        self.__dict__.update(site=state["site"], versions=versions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the site, by name."""
        return self.site.tensors()

    @property
    def device(self) -> torch.device:
        """The device of the results."""
        return next(iter(self.site.tensors().values())).device

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Site:
        """The site of other factors, each made of one of these."""
        return self.site.with_tensors({n: change(x) for n, x in self.site.tensors().items()})

    def weighted_sum(self, coef: Tensor) -> Tensor:
        """`sum_b coef_b G_b`."""
        total = self.site.reduce(("weighted_sum",), coef=coef).weighted_sum
        assert total is not None
        return total

    def order(self, examples: Tensor, rule: str, k: float) -> Tensor:
        """A robust aggregate of some of the gradients, as `Site.order` gives it of all."""
        return self.site.picked(examples).order(rule, k, False)

    def order_of_mixtures(self, mixing: Tensor, rule: str, k: float, drop: bool) -> Tensor:
        """A robust aggregate of sums of the gradients, as `Site.order` gives it of these.

        Args:
            mixing: Their weights, `[n, B]`; a row of NaN makes a point that is not finite.
            rule: The argument of `Site.order`, like the others.
            k: See there.
            drop: See there.
        """
        return order_of_mixtures(self.site, mixing, rule, k, drop)

    @property
    def changed(self) -> bool:
        """Whether a tensor has been changed in place, here or through the model."""
        return any(x._version != self.versions[n] for n, x in self.site.tensors().items())


def order_of_mixtures(site: Site, mixing: Tensor, rule: str, k: float, drop: bool) -> Tensor:
    """See `Factors.order_of_mixtures`."""

    def function(rows: Tensor) -> Tensor:
        weights = mixing.to(rows)
        # Examples without a part in any point may be not finite.
        rows = torch.where((weights.nan_to_num() != 0).any(0)[:, None], rows, 0)
        return dense_order(weights @ rows, rule, k, nonfinite="drop" if drop else "nan")

    return site.by_slices(function)


def outvoted_in(site: Site, batch: int, rule: str, k: float, drop: bool) -> Tensor:
    """In how many coordinates a rule clips each of `batch` examples, or cuts it away, `[B]`.

    The coordinates are gone through in parts that fit the workspace.
    """
    like = next(iter(site.tensors().values()))
    total = torch.zeros(batch, dtype=torch.float64, device=like.device)

    def count(rows: Tensor) -> Tensor:
        found = outvoted(rows, rule, k, drop)
        total.add_(found.sum(1, dtype=torch.float64))
        return found.sum(0)

    site.by_slices(count)
    if isinstance(site, ShardedSite):
        (summed,) = site.layout.sum(total)
        assert summed is not None
        return summed
    return total


@dataclass
class Results:
    """By parameter, what the backward passes of one block have measured.

    Attributes:
        parameters: All that are tracked.
        batch_size: `B`; `None` until a parameter has met examples.
        outputs: Fields of `pycoherence.ops.Reduced`, of the loss as it is.
        sum_norms: Numbers whose squares add up to the squared norm of the gradients' sum.
        factors: The factors of the per-example gradients.
        aggregated: How many numbers are not zero in the gradient that a rule over coordinates
            gave; `None` if that was not asked for.
        outvoted: In how many coordinates that rule clips each example or cuts it away, `[B]`, if
            that was asked for.
        skipped: Parameters that are not measured.
        fallbacks: Why parameters had their gradients made example by example.
        loss_scale: The number that the loss was multiplied by.
        failed: Whether a backward pass has raised, and left some results without the others.
        measured: Parameters that have met examples in a captured call.
        loss: The loss as it is, without its graph, where it is known.
    """

    parameters: dict[str, ParameterInfo]
    batch_size: int | None = None
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sum_norms: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    aggregated: dict[str, Tensor | None] = field(default_factory=dict)
    outvoted: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    loss_scale: float = 1.0
    failed: bool = False
    measured: set[str] = field(default_factory=set)
    loss: Tensor | None = None

    def forget(self, name: str) -> None:
        """Take back what was measured of a parameter."""
        for known in (
            *(self.outputs, self.sum_norms, self.factors),
            *(self.aggregated, self.outvoted),
        ):
            known.pop(name, None)


def expect_unchanged(factors: Mapping[str, Factors], what: str) -> None:
    """Raise if a tensor has been changed in place since it was kept.

    Args:
        factors: By parameter.
        what: When to have come, for the message.

    Raises:
        RuntimeError: One has.
    """
    changed = sorted(name for name, kept in factors.items() if kept.changed)
    if changed:
        raise RuntimeError(
            "an input or an output gradient has been changed in place since the backward pass, "
            f"so that the gradients of {', '.join(changed)} are lost; {what}"
        )


def row_norms(x: Tensor) -> Tensor:
    """Norms of the rows; the numbers themselves of a single row, or if there are few.

    They tell the norm of the whole, and unlike it, the order in which torch adds them up does not
    depend on the number of threads.
    """
    if is_dtensor(x):
        return norm_numbers(x)
    if x.dim() < 2 or x.shape[0] == 1 or x.numel() <= _FEW:
        return x.clone()  # the gradient itself belongs to the user
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))


_FEW = 1 << 13
"""Up to this size a copy takes less time than the norms."""
