"""Robust aggregates of gradients that are there already, one row for each example."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.dispatch import fastest
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.family.order import BYTES_BESIDE, order, order_reference, order_spec
from pycoherence.ops.family.reduce import check_factors, randn


def dense_order(rows: Tensor, rule: str, k: float = 0, *, nonfinite: str = "nan") -> Tensor:
    r"""A robust aggregate of each column of a matrix, by order statistics or signs.

    .. math:: A_j = \mathrm{rule}_k(v_1, \dots, v_B), \qquad v_b = \mathrm{rows}_{bj}

    The rules, of the values in order `v_(1) <= ... <= v_(B)`:

    ================= ===================== ====================================================
    rule              k                     value
    ================= ===================== ====================================================
    `winsorized_mean` number, `2 k < B`     mean of `clip(v, v_(k+1), v_(B-k))`
    `trimmed_mean`    number, `2 k < B`     mean of `v_(k+1)` to `v_(B-k)`
    `median`          0                     the middle value, or the mean of the two middle ones
    `lower_median`    0                     the middle value, or the lower of the two, as torch's
    `median_of_means` number, `1 <= k <= B` median of the means of `k` groups of examples
    `sign_agreement`  in `[0, 1]`           mean of `v` where `abs(mean(sign(v))) >= k`, else 0
    `phocas`          number, `2 k < B`     mean of the `B - k` values nearest the trimmed mean
    `meamed`          number, `k < B`       mean of the `B - k` values nearest the median
    ================= ===================== ====================================================

    Groups are of consecutive examples, of sizes that differ by at most one, the larger ones first,
    as `torch.tensor_split` cuts them. If two values are equally near, the lower is first.

    Scaling: A mean of the rows as they are: multiply by `B` for what stands in for their sum.

    Args:
        rows: One gradient in each row, `[B, ...]`, float16/bfloat16/float32/float64, any strides.
        rule: Name of the rule.
        k: Number of the rule; examples on each side, groups, or a share.
        nonfinite: For NaN and Inf, `"nan"` makes the coordinate NaN; `"drop"` applies the rule
            to the other examples there, and gives NaN if they are too few for `k`.
            `median_of_means` drops them from their groups, and groups that are left empty.

    Returns:
        `[...]`, float32, or float64 for float64 inputs. Zero-length `B` gives zeros, for any `k`.

    Raises:
        ValueError: The rule is unknown, `k` is out of its range, `nonfinite` is neither of the two,
            or there is no batch dimension.
        TypeError: The dtype is not floating.

    Cost: On the reference path a sort of each column, within the workspace or of one column. On a
    GPU (native) a thread reads its columns once, without workspace: means of few clipped values,
    and signs, of any batch; sorted in registers, batches of up to 128 (32 for float64) or means of
    up to 32 groups. Beyond that it reads them up to 32 times for each value that a rule looks for
    by its rank (64 times for float64).

    Source: Chatterjee 2020, arXiv:2002.10657 (winsorized mean); Yin et al. 2018, arXiv:1803.01498
    (trimmed mean, median); Zielinski et al. 2020, arXiv:2003.07422 (median of means); Parascandolo
    et al. 2020, arXiv:2009.00329 (sign agreement); Xie et al. 2018, arXiv:1805.09682 (phocas) and
    arXiv:1802.10116 (meamed).

    Example:
        >>> import torch, pycoherence as pc
        >>> rows = torch.tensor([[1.0, 5.0], [2.0, 6.0], [1e30, 7.0]])
        >>> pc.ops.dense_order(rows, "trimmed_mean", 1)
        tensor([2., 6.])
    """
    return order("dense_order", rows, rule=rule, k=k, nonfinite=nonfinite)


def _check(op: str, rows: Tensor) -> None:
    if rows.dim() == 0:
        raise ValueError(f"{op}: expected rows [B, ...], got a tensor without dimensions")
    check_factors(op, rows=rows)


def _like(rows: Tensor) -> tuple[Tensor, Sequence[int]]:
    return rows, rows.shape[1:]


def _reference(rows: Tensor, rule: str, k: float, drop: bool) -> Tensor:
    acc, columns = accumulate_dtype(rows.dtype), prod(rows.shape[1:])
    flat = rows.reshape(len(rows), columns)

    def gradients(part: slice) -> Chunks:
        return Chunks.of(lambda some: flat[some, part].to(acc), len(rows), columns, acc)

    found = order_reference(gradients, rows, (columns,), rule, k, drop)
    return found.view(rows.shape[1:])


def _heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for shape in ((7, 33), (1, 1), (2, 3), (8, 5, 3), (5,), (0, 4), (4, 0), (300, 3)):
        yield (randn(*shape, device=device, dtype=dtype),)
    yield (randn(18, 10, device=device, dtype=dtype).mT[::2, ::3],)


SPEC = register(
    order_spec(
        "dense_order(Tensor rows",
        check=_check,
        like=_like,
        reference=_reference,
        heads=_heads,
    )
)


def row_order(
    rows: Tensor, rule: str, k: float, drop: bool
) -> tuple[Callable[[Tensor, str, float, bool], Tensor], int]:
    """The implementation for such rows, and the bytes that it takes for each number beside it.

    It is the helper of kernels in Triton that make rows.
    """
    found = fastest(SPEC, rows.device.type, (rows, rule, k, drop)).kernel
    return found, BYTES_BESIDE if found is SPEC.reference else 0
