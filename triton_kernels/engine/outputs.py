"""From the partial results of the tile engine, or from rows, to the outputs of a `*_reduce` op."""

from collections.abc import Callable, Set
from functools import partial

import torch
from torch import Tensor

from pycoherence.ops.core.outputs import Reduced, zero_outputs
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.engine.factors import Factors, reduce
from pycoherence.triton_kernels.launch.finish import Finish, SumRequest, finished
from pycoherence.triton_kernels.rows.depthwise import gradients_in_parts
from pycoherence.triton_kernels.rows.materialised import row_parts, rows_of

_SUMS = ("weighted_sum", "second_moment", "sign_sum")


def reduced(
    factors: Factors,
    coef: Tensor | None,
    direction: Tensor | None,
    wanted: Set[str],
    request: SumRequest,
    finish: Finish,
) -> list[Tensor | None]:
    """All outputs but the Gram, in one pass over the factors, or two if `sum_dots` are wanted.

    Gradients that are `narrow` are made as rows, in one pass.

    Args:
        factors: Those of one batch.
        coef: The weights of the sum, `[B]`, or `None`.
        direction: Parameter-shaped.
        wanted: Names of the outputs.
        request: How the weighted sum is wanted.
        finish: Completes them.

    Returns:
        The outputs in the order of `Reduced`, sums `[O, K]`; `None` for `gram` and unwanted ones.
    """
    wanted = wanted - {"gram"}
    if factors.empty:
        return list(zero_outputs(factors.g, factors.shape, wanted))
    if not wanted:
        return [None] * len(Reduced._fields)
    if factors.narrow:
        return _of_rows(factors, coef, direction, wanted, request, finish)
    run = partial(one_pass, factors)
    found = with_sum_dots(run, wanted, coef, direction, request, finish)
    return [found[name] if name in wanted else None for name in Reduced._fields]


def with_sum_dots(
    run: Callable[..., dict[str, Tensor]],
    wanted: Set[str],
    coef: Tensor | None,
    direction: Tensor | None,
    request: SumRequest,
    finish: Finish,
) -> dict[str, Tensor]:
    """The outputs of a pass, of two if `sum_dots` are wanted; there may be a sum more.

    Args:
        run: Makes one pass; it takes the other arguments, without `sum_dots`.
        wanted: Outputs other than `gram`.
        coef: The weights of the sum.
        direction: Parameter-shaped.
        request: How the weighted sum is wanted.
        finish: Completes them.
    """
    first = wanted - {"sum_dots"}
    if "sum_dots" not in wanted:
        return run(first, coef, direction, request, finish)
    # Their direction is known only when the whole batch has been added up.
    found = finished(run, first | {"weighted_sum"}, coef, direction, SumRequest())
    dots = run({"dots"}, None, found["weighted_sum"], request, finish)["dots"]
    return found | {"sum_dots": dots}


def one_pass(
    factors: Factors,
    wanted: Set[str],
    coef: Tensor | None,
    direction: Tensor | None,
    request: SumRequest,
    finish: Finish,
) -> dict[str, Tensor]:
    """The outputs of one pass of the engine, whose partial results `finish` adds up.

    Args:
        factors: Those of one batch, not empty.
        wanted: Outputs other than `sum_dots` and `gram`.
        coef: The weights of the sum.
        direction: Parameter-shaped.
        request: How the weighted sum is wanted.
        finish: Completes them.
    """
    partial = reduce(factors, frozenset(wanted), coef, direction, request=request)
    found: dict[str, Tensor] = {}
    for name, each in partial.items():
        if name not in _SUMS:
            found[name] = finish.numbers(each)
        elif name == "weighted_sum":
            found[name] = each[0] if len(each) == 1 else finish.like_parameter(each, request)
        else:
            found[name] = finish.like_parameter(each)
    return found


def _of_rows(
    factors: Factors,
    coef: Tensor | None,
    direction: Tensor | None,
    wanted: Set[str],
    request: SumRequest,
    finish: Finish,
) -> list[Tensor | None]:
    """The outputs of `reduced`, from gradients that are rows, in parts that fit the workspace."""
    size = len(factors.x) * accumulate_dtype(factors.x.dtype).itemsize
    along = None if direction is None else direction.reshape(factors.shape)
    parts = list(row_parts(factors, size))

    def of_part(part: slice, request: SumRequest, finish: Finish) -> tuple[Tensor | None, ...]:
        rows = gradients_in_parts(rows_of(factors, part))
        v = None if along is None else along[part].flatten()
        return finish.rows(rows, factors.g, coef, v, wanted, request)

    if len(parts) == 1:
        outputs = of_part(parts[0], request, finish)
        return [
            x.view(factors.shape) if name in _SUMS and x is not None else x
            for name, x in zip(Reduced._fields, outputs, strict=True)
        ]
    # Parts that are joined here must be complete.
    found = [finished(of_part, part, SumRequest()) for part in parts]
    out: list[Tensor | None] = []
    for name, each in zip(Reduced._fields, zip(*found, strict=True), strict=True):
        if each[0] is None:
            out.append(None)
        elif name in _SUMS:
            out.append(torch.cat(each).view(factors.shape))
        else:
            out.append(torch.stack(each).sum(0))
    return out
