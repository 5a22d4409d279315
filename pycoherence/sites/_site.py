"""What every kind of site can do."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops._reduce import mask, unpack
from pycoherence.ops._register import execute
from pycoherence.ops._rules import check_rule


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

    def rows(self) -> Tensor:
        """The gradients `G_b`, `[B, *shape]`, in accumulation dtype: much memory."""
        ...

    def with_others(self, others: Sequence[Any]) -> "Site | None":
        """The site of the sum with others of its kind, if it has the same kind of factors.

        Args:
            others: Further uses of the parameter, by the same examples.
        """
        ...


def norm_rows(site: Site) -> tuple[Tensor, ...]:
    """Rows `[B, n]` of which the norms, multiplied, are those of `G_b`; none if it has no such."""
    own = getattr(site, "norm_rows", None)
    return () if own is None else own()


def reduce(
    op: str, want: Sequence[str], *head: Any, coef: Tensor | None, direction: Tensor | None
) -> Reduced:
    """Run a `*_reduce` op, past the checks of its arguments: a site's are right as they are."""
    bits = mask(want)
    return unpack(execute(op, *head, coef, direction, bits), bits)


def order(op: str, batch: int, *head: Any, rule: str, k: float, drop: bool) -> Tensor:
    """Run a `*_order` op; only whether the rule fits the size of the batch is not known yet."""
    check_rule(op, batch, rule, k)
    return execute(op, *head, rule, k, drop)


def shaped(out: Reduced, shape: Sequence[int]) -> Reduced:
    """Give what is like the parameter its shape."""
    like = ("weighted_sum", "second_moment", "sign_sum")
    found = {name: x for name in like if (x := getattr(out, name)) is not None}
    return out._replace(**{name: x.view(tuple(shape)) for name, x in found.items()})


def positions_last(x: Tensor) -> Tensor:
    """Give a layer's `[B, ..., C]` tensor the ops' shape `[B, T, C]`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def channels_last(x: Tensor) -> Tensor:
    """Give a layer's `[B, C, ...]` tensor the ops' shape `[B, T, C]`."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).mT


def joined(x: Tensor, n: int) -> Tensor:
    """Make the positions of `n` examples those of one: `[B, T, ...]` to `[B / n, n T, ...]`."""
    return x.unflatten(0, (-1, n)).flatten(1, 2)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Join the positions of the same examples, `[B, T_i, ...]`, in one dtype."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return torch.cat([x.to(dtype) for x in tensors], 1)
