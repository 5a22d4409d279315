"""Reductions over per-example gradients of a linear layer's weight, on a GPU."""

from collections.abc import Set
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from pycoherence.ops.core.outputs import Reduced, zero_outputs
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.engine.cost import from_engine
from pycoherence.triton_kernels.engine.factors import Factors, tile_of
from pycoherence.triton_kernels.engine.outputs import one_pass, with_sum_dots
from pycoherence.triton_kernels.engine.tiles import kind_of
from pycoherence.triton_kernels.ghost.norms import ghost_sq_norms
from pycoherence.triton_kernels.launch.device import precision
from pycoherence.triton_kernels.launch.finish import Completed, Finish, SumRequest
from pycoherence.triton_kernels.linear_gram import linear_gram
from pycoherence.triton_kernels.matmul.outer_sums import sum_of_products
from pycoherence.triton_kernels.matmul.row_dots import row_dots
from pycoherence.triton_kernels.rows.rank_one import sq_norms_of_rank_one


@Completed
def linear_reduce(
    x: Tensor,
    g: Tensor,
    coef: Tensor | None,
    direction: Tensor | None,
    wanted: Set[str],
    request: SumRequest,
    finish: Finish,
) -> tuple[Tensor | None, ...]:
    """The op of this name.

    Args:
        x: `[B, T, I]`.
        g: `[B, T, O]`.
        coef: `[B]` or `None`.
        direction: `[O, I]` or `None`.
        wanted: Names of the outputs.
        request: How the weighted sum is wanted.
        finish: Completes the outputs.
    """
    if not x.numel() or not g.numel():
        return zero_outputs(g, (g.shape[2], x.shape[2]), wanted)
    run = partial(_without_sum, x, g)
    found = with_sum_dots(run, wanted - {"gram"}, coef, direction, request, finish)
    if "gram" in wanted:
        found["gram"] = linear_gram(x, g, None, None)
    return tuple(found[name] if name in wanted else None for name in Reduced._fields)


def _without_sum(
    x: Tensor,
    g: Tensor,
    wanted: Set[str],
    coef: Tensor | None,
    direction: Tensor | None,
    request: SumRequest,
    finish: Finish,
) -> dict[str, Tensor]:
    """The outputs for which the sum need not be known, each the way that costs least."""
    (b, t, i), o = x.shape, g.shape[2]
    kind = kind_of(x.dtype, precision(x.dtype))
    wide = tile_of(Factors.of_linear(x, g), wanted).wide
    chosen = from_engine(b, t, i, o, kind, frozenset(wanted), coef is not None, wide)
    found: dict[str, Tensor] = {}
    if chosen:
        found = one_pass(_readable(x, g), chosen, coef, direction, request, finish)
    for name in wanted - chosen:
        if name == "sq_norms":
            found[name] = sq_norms_of_rank_one(x, g) if t == 1 else ghost_sq_norms(x, g, finish)
        elif name == "dots" and direction is not None:
            found[name] = row_dots(x, g, direction.to(accumulate_dtype(x.dtype)))
        else:
            found[name] = _sum(name, x, g, coef, request, finish)
    return found


def _sum(
    name: str, x: Tensor, g: Tensor, coef: Tensor | None, request: SumRequest, finish: Finish
) -> Tensor:
    """The sum of a transform of the products of all positions, of all examples in a row.

    Factors are copied if their positions do not lie in a row.
    """
    rows = x.flatten(0, 1), g.flatten(0, 1)
    if name != "weighted_sum":
        return sum_of_products(*rows, finish, _TRANSFORM[name])
    if coef is None:
        return sum_of_products(*rows, finish, request=request)
    return sum_of_products(*rows, finish, "scale", coef.repeat_interleave(x.shape[1]), request)


_TRANSFORM = {"second_moment": "square", "sign_sum": "sign"}


def _readable(x: Tensor, g: Tensor) -> Factors:
    """The factors of the engine, whose rows can be read in vectors."""
    (x, more_i), (g, more_o) = _padded(x), _padded(g)
    return Factors.of_linear(x, g)._replace(behind=(more_o, more_i))


def _padded(x: Tensor) -> tuple[Tensor, int]:
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
