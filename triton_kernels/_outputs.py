"""From the partial results of the tile engine, or from rows, to the outputs of a `*_reduce` op."""

from collections.abc import Set

import torch
from torch import Tensor

from pycoherence.ops._reduce import Reduced, reduce_zeros
from pycoherence.ops._spec import accumulate_dtype
from pycoherence.triton_kernels._depthwise import gradients_in_parts
from pycoherence.triton_kernels._factors import Factors, reduce
from pycoherence.triton_kernels._materialised import added, row_parts, rows_of
from pycoherence.triton_kernels._reduce_rows import reduce_rows

GRAM = 1 << Reduced._fields.index("gram")
_SUMS = ("weighted_sum", "second_moment", "sign_sum")
_ONE_PASS = {"sq_norms", "dots", *_SUMS}


def reduced(
    factors: Factors, coef: Tensor | None, direction: Tensor | None, want: int
) -> list[Tensor | None]:
    """All outputs but the Gram, in one pass over the factors, or two if `sum_dots` are wanted.

    Gradients that are `narrow` are made as rows, in one pass.

    Args:
        factors: Of one batch.
        coef: As of the op; so are the others.
        direction: Parameter-shaped.
        want: Mask of wanted outputs.

    Returns:
        The outputs in the order of `Reduced`, sums `[O, K]`; `None` for `gram` and unwanted ones.
    """
    want &= ~GRAM
    if factors.empty:
        return list(reduce_zeros(factors.g, factors.shape, want))
    if factors.narrow:
        return _of_rows(factors, coef, direction, want)
    wanted = {name for i, name in enumerate(Reduced._fields) if want >> i & 1}
    first = wanted & _ONE_PASS | ({"weighted_sum"} if "sum_dots" in wanted else set())
    found = one_pass(factors, first, coef, direction) if first else {}
    if "sum_dots" in wanted:
        # Their direction is known only when the whole batch has been added up.
        again = one_pass(factors, {"dots"}, direction=found["weighted_sum"])
        found["sum_dots"] = again["dots"]
    return [found[name] if name in wanted else None for name in Reduced._fields]


def one_pass(
    factors: Factors,
    wanted: Set[str],
    coef: Tensor | None = None,
    direction: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the engine gives in one pass, with its partial results added up.

    Args:
        factors: Of one batch, not empty.
        wanted: Outputs, but for `sum_dots` and `gram`.
        coef: As of the op.
        direction: Parameter-shaped.
    """
    partial = reduce(factors, frozenset(wanted), coef, direction)
    return {name: added(each, int(name not in _SUMS)) for name, each in partial.items()}


def _of_rows(
    factors: Factors, coef: Tensor | None, direction: Tensor | None, want: int
) -> list[Tensor | None]:
    """What `reduced` gives, from gradients that are rows, as many as the workspace holds."""
    size = len(factors.x) * accumulate_dtype(factors.x.dtype).itemsize
    along = None if direction is None else direction.reshape(factors.shape)
    found = [
        reduce_rows(
            gradients_in_parts(rows_of(factors, part)),
            factors.g,
            coef,
            None if along is None else along[part].flatten(),
            want,
        )
        for part in row_parts(factors, size)
    ]
    out = []
    for name, each in zip(Reduced._fields, zip(*found, strict=True), strict=True):
        if each[0] is None:
            out.append(None)
        elif name in _SUMS:
            out.append((each[0] if len(each) == 1 else torch.cat(each)).view(factors.shape))
        else:
            out.append(added(torch.stack(each), 0))
    return out
