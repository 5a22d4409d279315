"""Reductions over per-example gradients of a linear layer's weight, on a GPU."""

import torch.nn.functional as F
from torch import Tensor

from pycoherence.ops._reduce import Reduced, reduce_zeros
from pycoherence.ops._spec import accumulate_dtype
from pycoherence.triton_kernels._device import precision
from pycoherence.triton_kernels._dots import row_dots
from pycoherence.triton_kernels._factors import Factors
from pycoherence.triton_kernels._hadamard import ghost_sq_norms
from pycoherence.triton_kernels._outer_sums import sum_of_products
from pycoherence.triton_kernels._outputs import one_pass
from pycoherence.triton_kernels._plan import from_engine
from pycoherence.triton_kernels._rows import sq_norms_of_rank_one
from pycoherence.triton_kernels._tiles import kind_of
from pycoherence.triton_kernels.linear_gram import linear_gram


def linear_reduce(
    x: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None, want: int
) -> tuple[Tensor | None, ...]:
    """The op of this name.

    Args:
        x: `[B, T, I]`.
        g: `[B, T, O]`.
        coef: `[B]` or `None`.
        direction: `[O, I]` or `None`.
        want: Mask of wanted outputs.
    """
    wanted = {name for i, name in enumerate(Reduced._fields) if want >> i & 1}
    if not x.numel() or not g.numel():
        return reduce_zeros(g, (g.shape[2], x.shape[2]), want)
    found = _without_sum(x, g, coef, direction, wanted - {"sum_dots", "gram"})
    if "sum_dots" in wanted:
        total = found.get("weighted_sum")
        if total is None:
            total = _without_sum(x, g, coef, None, {"weighted_sum"})["weighted_sum"]
        found["sum_dots"] = _without_sum(x, g, None, total, {"dots"})["dots"]
    if "gram" in wanted:
        found["gram"] = linear_gram(x, g, None, None)
    return tuple(found.get(name) for name in Reduced._fields)


def _without_sum(
    x: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None, wanted: set[str]
) -> dict[str, Tensor]:
    """The outputs for which the sum need not be known, each the way that costs least."""
    (b, t, i), o = x.shape, g.shape[2]
    kind = kind_of(x.dtype, precision(x.dtype))
    chosen = from_engine(b, t, i, o, kind, frozenset(wanted), coef is not None)
    found = _by_engine(x, g, coef, direction, chosen) if chosen else {}
    for name in wanted - chosen:
        if name == "sq_norms":
            found[name] = sq_norms_of_rank_one(x, g) if t == 1 else ghost_sq_norms(x, g)
        elif name == "dots" and direction is not None:
            found[name] = row_dots(x, g, direction.to(accumulate_dtype(x.dtype)))
        elif name == "weighted_sum" and coef is not None:
            found[name] = sum_of_products(*_rows(x, g), "scale", coef.repeat_interleave(t))
        else:
            found[name] = sum_of_products(*_rows(x, g), _TRANSFORM[name])
    return found


def _by_engine(
    x: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None, wanted: frozenset[str]
) -> dict[str, Tensor]:
    (x, more_i), (g, more_o) = _readable(x), _readable(g)
    factors = Factors.of_linear(x, g)._replace(behind=(more_o, more_i))
    return one_pass(factors, wanted, coef, direction)


def _readable(x: Tensor) -> tuple[Tensor, int]:
    """Factors whose rows can be read in vectors, and how many zeros lie behind each row.

    Rows of an odd number of half-precision numbers, such as 50257 words, would be read one number
    at a time, which should take longer than their product (predicted). They are copied.
    """
    size = x.shape[2]
    if x.element_size() != 2 or size % 8 == 0 or size < _MANY:
        return x, 0
    more = -size % 64
    return F.pad(x, (0, more))[..., :size], more


_MANY = 1024


def _rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """All positions of all examples in a row; copies if they do not lie so."""
    return x.flatten(0, 1), g.flatten(0, 1)


_TRANSFORM = {"weighted_sum": "plain", "second_moment": "square", "sign_sum": "sign"}
