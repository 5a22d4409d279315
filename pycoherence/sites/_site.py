"""The methods of every kind of site."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.core.call import call_unchecked
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.ops.family.order import BYTES_BESIDE
from pycoherence.ops.family.reduce import mask_of, unpack
from pycoherence.ops.family.rules import check_rule

S = TypeVar("S", bound="FactoredSite")

PARAMETER_SHAPED = ("weighted_sum", "second_moment", "sign_sum")
"""The fields of `Reduced` that have the shape of the parameter."""


class Site(Protocol):
    """The factors of one parameter's per-example gradients `G_b`: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """Reductions over `G_b`; `direction` and what is like it have the parameter's shape."""
        ...

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """A robust aggregate of `G_b`, parameter-shaped; the rules are those of `dense_order`."""
        ...

    def grouped(self, n: int) -> "Site":
        """The site whose examples are `n` consecutive ones of this, which are a multiple of `n`."""
        ...

    def picked(self, examples: Tensor) -> "Site":
        """The site of some examples, in the order in which they are given."""
        ...

    def rows(self) -> Tensor:
        """The gradients `G_b`, `[B, *shape]`, in accumulation dtype: much memory."""
        ...

    def by_slices(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the gradients of each coordinate, without holding all of them.

        Args:
            function: From gradients `[B, n]` of some coordinates, in accumulation dtype, a number
                for each, `[n]`. Coordinates that are zero in all examples may be passed over, and
                have the result zero.

        Returns:
            Its numbers, parameter-shaped.
        """
        ...

    def with_others(self, others: Sequence[Any]) -> "Site | None":
        """The site of the sum with others of its kind, if it has the same kind of factors.

        Args:
            others: Further uses of the parameter, by the same examples.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that the site holds, those of sites inside it too, by names of its own."""
        ...

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Site":
        """The same site with other tensors in the place of those that `tensors` names."""
        ...


class Side(NamedTuple):
    """One way to cut a parameter into slices.

    Attributes:
        dim: The dimension of `op_shape` that is cut.
        units: How many slices there can be.
        size: How long each is along `dim`.
        split: The factors that are cut with it; for each its dimension, and how much of it belongs
            to a unit.
        whole: The factors that every slice needs.
    """

    dim: int
    units: int
    size: int
    split: Mapping[str, tuple[int, int]]
    whole: tuple[str, ...] = ()


class FactoredSite:
    """A site whose fields are the factors that one family of ops takes.

    A subclass is a frozen dataclass. It names its family, gives the ops' arguments in `head` and
    says in `op_shape` how the ops see the parameter; the reshapes to and from `shape` are here.

    Attributes:
        family: The start of the names of the ops.
        g: Gradient with respect to the layer output; its first dimension is the batch.
        shape: Shape of the parameter if it is not `op_shape`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: ClassVar[str]
    g: Tensor
    shape: Sequence[int] | None

    @property
    def op_shape(self) -> tuple[int, ...]:
        """The shape that the ops give to the parameter."""
        raise NotImplementedError

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.op_shape if self.shape is None else tuple(self.shape)

    def head(self) -> tuple[Any, ...]:
        """The arguments of the ops before those that all ops share."""
        raise NotImplementedError

    def chunks(self) -> Chunks:
        """The gradients of `op_shape`, in parts."""
        raise NotImplementedError

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """See `Site.reduce`."""
        op, args = self.reduce_call(want, coef, direction)
        # Past the checks of the op's arguments: a site's are right as they are.
        return self.reduced(call_unchecked(op, *args))

    def reduce_call(
        self, want: Sequence[str], coef: Tensor | None, direction: Tensor | None
    ) -> tuple[str, tuple[Any, ...]]:
        """The op that reduces, and its arguments."""
        if self.shape is not None and direction is not None:
            direction = direction.reshape(self.op_shape)
        return _reduce_of(self.family), (*self.head(), coef, direction, mask_of(tuple(want)))

    def reduced(self, found: Any) -> Reduced:
        """The outputs of that op, of the shape of the parameter."""
        out = unpack(found)
        return out if self.shape is None else shaped(out, self.shape)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """See `Site.order`."""
        op = f"{self.family}_order"
        return self.as_parameter(order(op, len(self.g), *self.head(), rule=rule, k=k, drop=drop))

    def picked(self: S, examples: Tensor) -> S:
        """See `Site.picked`; a factor of one row is the same for all."""
        batch, examples = len(self.g), examples.to(self.g.device)
        found = {n: x[examples] for n, x in self.tensors().items() if len(x) == batch}
        return replace(self, **found)

    def rows(self) -> Tensor:
        """See `Site.rows`."""
        rows = self.chunks().joined()
        return self.as_parameter(rows, len(rows))

    def by_slices(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Site.by_slices`: as many units of a side as fit the workspace at a time."""
        site = self.plain()
        side = max(site.sides(), key=lambda side: side.units)
        acc, shape = accumulate_dtype(site.g.dtype), site.op_shape
        out = site.g.new_empty(shape, dtype=acc)
        # The rows are there with a copy that is sorted, and its indices.
        unit = len(site.g) * prod(shape) // max(1, side.units) * (acc.itemsize + BYTES_BESIDE)
        step = max(1, workspace(out.device) // max(1, unit))
        for start in range(0, side.units if out.numel() else 0, step):
            units = min(step, side.units - start)
            factors = {
                name: getattr(site, name).narrow(dim, start * n, units * n)
                for name, (dim, n) in side.split.items()
            }
            part = out.narrow(side.dim, start * side.size, units * side.size)
            rows = site.cut(side, factors, units).rows()
            part.copy_(function(rows.flatten(1)).view(part.shape))
        return self.as_parameter(out)

    def as_parameter(self, x: Tensor, *batch: int) -> Tensor:
        """Give a tensor `[*batch, *op_shape]` the shape of the parameter, `[*batch, *shape]`."""
        return x if self.shape is None else x.view((*batch, *self.shape))

    def reshaped(self: S, shape: Sequence[int]) -> S:
        """The same numbers as the gradients of a parameter of another shape."""
        shape = tuple(shape)
        if shape == self.parameter_shape:
            return self
        return replace(self, shape=None if shape == self.op_shape else shape)

    # For the exchange with other processes, of a site that `plain` gave.

    def plain(self: S) -> S:
        """The same gradients, of `op_shape`, with factors as the ops take them."""
        return replace(self, shape=None)

    def sides(self) -> Sequence[Side]:
        """The ways to cut the parameter; none if this takes the gradients themselves."""
        return ()

    def places(self) -> tuple[int, ...]:
        """The number of positions; several numbers if no zeros can be put behind the last one."""
        return ()

    def options(self) -> tuple[Any, ...]:
        """The settings that tell sites of this kind apart, beside shapes."""
        return ()

    def padded(self: S, positions: int) -> S:
        """The same gradients with zeros behind the last position, if `places` is one number."""
        return self

    def scaled(self: S, scale: Tensor | float) -> S:
        """Gradients that are `scale` times as large."""
        # Halves would be rounded.
        short = (torch.float16, torch.bfloat16)
        found = {n: x.float() if x.dtype in short else x for n, x in self.tensors().items()}
        return self.with_tensors(found | {"g": found["g"] * scale})

    def cut(self: S, side: Side, factors: Mapping[str, Tensor], units: int) -> S:
        """The site of a slice of so many units, from its factors."""
        return replace(self, **factors)

    def tensors(self) -> dict[str, Tensor]:
        """See `Site.tensors`: by field."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def with_tensors(self: S, tensors: Mapping[str, Tensor]) -> S:
        """See `Site.with_tensors`."""
        return replace(self, **tensors)


@functools.cache
def _reduce_of(family: str) -> str:
    """The name of an op; to join two strings anew takes as long as to look one up."""
    return f"{family}_reduce"


def nested(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a site inside a site, from all tensors of the outer one.

    Args:
        tensors: By name.
        prefix: The start of the names of the inner ones, which is taken off.
    """
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def norm_rows(site: Site) -> tuple[Tensor, ...]:
    """Rows `[B, n]` whose norms, multiplied, are those of `G_b`; empty if it has no such."""
    own = getattr(site, "norm_rows", None)
    return () if own is None else own()


def order(op: str, batch: int, *head: Any, rule: str, k: float, drop: bool) -> Tensor:
    """Run a `*_order` op; only whether the rule fits the size of the batch is not known yet."""
    check_rule(op, batch, rule, k)
    return call_unchecked(op, *head, rule, k, drop)


def shaped(out: Reduced, shape: Sequence[int]) -> Reduced:
    """Give what is like the parameter its shape."""
    found = {name: x for name in PARAMETER_SHAPED if (x := getattr(out, name)) is not None}
    return out._replace(**{name: x.view(tuple(shape)) for name, x in found.items()})


def positions_last(x: Tensor) -> Tensor:
    """Give a layer's `[B, ..., C]` tensor the ops' shape `[B, T, C]`."""
    if x.dim() == 3:
        return x
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def channels_last(x: Tensor) -> Tensor:
    """Give a layer's `[B, C, ...]` tensor the ops' shape `[B, T, C]`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).mT


def joined(x: Tensor, n: int) -> Tensor:
    """Make the positions of `n` examples those of one: `[B, T, ...]` to `[B / n, n T, ...]`."""
    return x.unflatten(0, (len(x) // n, n)).flatten(1, 2)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Join the positions of the same examples, `[B, T_i, ...]`, in one dtype."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return torch.cat([x.to(dtype) for x in tensors], 1)
