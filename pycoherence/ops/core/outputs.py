"""The outputs of every `*_reduce` op: their names, the mask of those wanted, and their memory."""

import functools
from collections.abc import Sequence, Set
from typing import NamedTuple

from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype


class Reduced(NamedTuple):
    """Reductions over the per-example gradients `G_b` of one parameter; `None` where not wanted.

    All are float32, or float64 for float64 inputs.

    Attributes:
        sq_norms: `[B]`, the squared norms `||G_b||^2`.
        dots: `[B]`, the dot products `<G_b, direction>`.
        weighted_sum: Parameter-shaped, `sum_b coef_b G_b` (`coef_b = 1` if none is given). An
            example whose coefficient is exactly zero is left out, even if its gradient is not
            finite.
        second_moment: Parameter-shaped, `sum_b G_b^2` per coordinate.
        sign_sum: Parameter-shaped, `sum_b sign(G_b)` per coordinate, NaN where a `G_b` is NaN.
        sum_dots: `[B]`, the dot products `<G_b, weighted_sum>`.
        gram: `[B, B]`, the dot products `<G_b, G_c>`.
    """

    sq_norms: Tensor | None = None
    dots: Tensor | None = None
    weighted_sum: Tensor | None = None
    second_moment: Tensor | None = None
    sign_sum: Tensor | None = None
    sum_dots: Tensor | None = None
    gram: Tensor | None = None


def mask(want: Sequence[str]) -> int:
    """The `want` argument of the schemas: bit i is set iff field i of `Reduced` is wanted."""
    if isinstance(want, str):
        raise TypeError(f"expected want to be a tuple of names such as ({want!r},), got a string")
    return _mask(tuple(want))


def _mask(want: tuple[str, ...]) -> int:
    unknown = [name for name in want if name not in Reduced._fields]
    if unknown or not want:
        raise ValueError(
            f"expected want to name some of {', '.join(Reduced._fields)}, got {want!r}"
        )
    return sum(1 << i for i, name in enumerate(Reduced._fields) if name in want)


mask_of = functools.cache(_mask)
"""The mask of a tuple, looked up; torch.compile warns of what is, and so traces `mask`."""


unpack = Reduced._make
"""Gives the outputs of an op their names."""


def names_of(want: int) -> frozenset[str]:
    """The names in a mask, which nothing else takes apart."""
    # A trace may have a symbol for the number.
    return _names_of(int(want))


@functools.cache
def _names_of(want: int) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(Reduced._fields) if want >> i & 1)


def empty_outputs(g: Tensor, shape: Sequence[int], wanted: Set[str]) -> tuple[Tensor | None, ...]:
    """Uninitialised outputs, `None` where not wanted.

    Args:
        g: Output gradient; tells batch size, dtype and device.
        shape: Shape of the parameter.
        wanted: Their names.
    """
    dtype = accumulate_dtype(g.dtype)
    batch, parameter = (g.shape[0],), tuple(shape)
    sizes = (batch, batch, parameter, parameter, parameter, batch, batch * 2)
    return tuple(
        g.new_empty(size, dtype=dtype) if name in wanted else None
        for name, size in zip(Reduced._fields, sizes, strict=True)
    )


def zero_outputs(g: Tensor, shape: Sequence[int], wanted: Set[str]) -> tuple[Tensor | None, ...]:
    """The same, filled with zeros."""
    return tuple(None if x is None else x.zero_() for x in empty_outputs(g, shape, wanted))
