"""Reductions over gradients that are one row of numbers for each example."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops._chunks import products
from pycoherence.ops._reduce import mask, reduce_fake
from pycoherence.ops._spec import accumulate_dtype
from pycoherence.triton_kernels._device import launch

PARTS = 16
"""So many parts of a row are best added up where they are read; more, by a launch of their own."""

# Of one program: so many numbers of a row, and so many rows, in the order they are added up.
_LONGEST, _MOST = 2**14, 2**10

_TOTAL, _SUM_DOTS, _GRAM = (mask((name,)) for name in ("weighted_sum", "sum_dots", "gram"))


def reduce_rows(
    rows: Tensor, g: Tensor, coef: Tensor | None, direction: Tensor | None, want: int
) -> tuple[Tensor | None, ...]:
    """The outputs of a `*_reduce` op from the rows, in one launch for all but the last two.

    Args:
        rows: `[B, parts, C]`, any strides; the gradient of an example is the sum of its parts.
        g: Output gradient; tells the dtypes.
        coef: `[B]` or `None`.
        direction: `[C]` or `None`.
        want: Mask of wanted outputs.
    """
    acc = accumulate_dtype(g.dtype)
    if rows.shape[1] > PARTS or want & _GRAM:
        rows = rows.sum(1, keepdim=True, dtype=acc)
    outputs = reduce_fake(g, rows.shape[2:], want)
    sq_norms, dots, total, moment, signs, sum_dots, gram = outputs
    if want & _SUM_DOTS and total is None:
        total = rows.new_empty(rows.shape[2], dtype=acc)
    _run(rows, coef, direction, (sq_norms, dots), (total, moment, signs))
    if sum_dots is not None:
        _run(rows, None, total, (None, sum_dots), (None, None, None))
    if gram is not None:
        gram.copy_(products(rows, rows))
    return outputs


def _run(
    rows: Tensor,
    coef: Tensor | None,
    direction: Tensor | None,
    by_row: tuple[Tensor | None, ...],
    by_column: tuple[Tensor | None, ...],
) -> None:
    """Write `sq_norms, dots` and `weighted_sum, second_moment, sign_sum`; `None` is not wanted."""
    b, parts, c = rows.shape
    wide = 1024 if c > 128 else 128 if c > 16 else 16
    high = 1024 // wide
    long, many = triton.cdiv(c, _LONGEST), max(1, triton.cdiv(b, _MOST))
    row_blocks = long * triton.cdiv(b, high) if any(out is not None for out in by_row) else 0
    column_blocks = many * triton.cdiv(c, 32) if any(out is not None for out in by_column) else 0
    to = [_partial(out, n) for outs, n in ((by_row, long), (by_column, many)) for out in outs]
    launch(
        _reduce,
        (row_blocks + column_blocks,),
        *(rows, coef, direction, *to, b, parts, c, row_blocks, rows.stride()),
        *(None if vector is None else vector.stride(0) for vector in (coef, direction)),
        ROW_TILE=(high, wide),
        COLUMN_TILE=(64 if b > 64 else 16, 32),
        LONGEST=_LONGEST,
        MOST=_MOST,
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
    )
    for out, partial in zip((*by_row, *by_column), to, strict=True):
        if out is not None and partial is not out and partial is not None:
            torch.sum(partial, 0, out=out)


def _partial(out: Tensor | None, parts: int) -> Tensor | None:
    """Where sums of so many parts of an output go: the output itself if there is one part."""
    return out if out is None or parts == 1 else out.new_empty(parts, *out.shape)


@triton.jit(do_not_specialize=["B", "row_blocks"])
def _reduce(
    rows,
    coef,
    direction,
    sq_norms,
    dots,
    total,
    moment,
    signs,
    B,
    parts,
    C,
    row_blocks,
    strides,
    coef_stride,
    direction_stride,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The first `row_blocks` programs sum over channels, the others over examples.

    rows [B, parts, C], coef [B], direction [C]; outputs contiguous and `None` where unwanted:
    sq_norms, dots [cdiv(C, LONGEST), B]; total, moment, signs [cdiv(B, MOST), C].
    """
    block = tl.program_id(0)
    if block < row_blocks:
        if sq_norms is not None or dots is not None:
            _by_row(
                rows,
                direction,
                sq_norms,
                dots,
                block,
                B,
                parts,
                C,
                strides,
                direction_stride,
                ROW_TILE,
                LONGEST,
                ACC,
            )
    elif total is not None or moment is not None or signs is not None:
        _by_column(
            rows,
            coef,
            total,
            moment,
            signs,
            block - row_blocks,
            B,
            parts,
            C,
            strides,
            coef_stride,
            COLUMN_TILE,
            MOST,
            ACC,
        )


@triton.jit
def _load(rows, b, c, inside, parts, strides, ACC: tl.constexpr):
    """A tile of the rows, parts added up; zero outside."""
    at = rows + b.to(tl.int64)[:, None] * strides[0] + c.to(tl.int64)[None, :] * strides[2]
    value = tl.full(inside.shape, 0, ACC)
    for _ in range(parts):
        value += tl.load(at, inside, 0).to(ACC)
        at += strides[1]
    return value


@triton.jit
def _by_row(
    rows,
    direction,
    sq_norms,
    dots,
    block,
    B,
    parts,
    C,
    strides,
    direction_stride,
    TILE: tl.constexpr,
    LONGEST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Norms and dot products of TILE[0] examples, of up to LONGEST of their channels."""
    blocks = (B + TILE[0] - 1) // TILE[0]
    b = block % blocks * TILE[0] + tl.arange(0, TILE[0])
    first = block // blocks * LONGEST
    norm = tl.full(TILE, 0, ACC)
    dot = tl.full(TILE, 0, ACC)
    for start in range(first, tl.minimum(first + LONGEST, C), TILE[1]):
        c = start + tl.arange(0, TILE[1])
        value = _load(rows, b, c, (b < B)[:, None] & (c < C)[None, :], parts, strides, ACC)
        if sq_norms is not None:
            norm += value * value
        if dots is not None:
            along = tl.load(direction + c.to(tl.int64) * direction_stride, c < C, 0).to(ACC)
            dot += value * along[None, :]
    to = (block // blocks).to(tl.int64) * B + b
    if sq_norms is not None:
        tl.store(sq_norms + to, tl.sum(norm, 1), b < B)
    if dots is not None:
        tl.store(dots + to, tl.sum(dot, 1), b < B)


@triton.jit
def _by_column(
    rows,
    coef,
    total,
    moment,
    signs,
    block,
    B,
    parts,
    C,
    strides,
    coef_stride,
    TILE: tl.constexpr,
    MOST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums of TILE[1] channels over up to MOST examples."""
    blocks = (C + TILE[1] - 1) // TILE[1]
    c = block % blocks * TILE[1] + tl.arange(0, TILE[1])
    first = block // blocks * MOST
    sum_1 = tl.full(TILE, 0, ACC)
    sum_2 = tl.full(TILE, 0, ACC)
    count = tl.full(TILE, 0, ACC)
    for start in range(first, tl.minimum(first + MOST, B), TILE[0]):
        b = start + tl.arange(0, TILE[0])
        value = _load(rows, b, c, (b < B)[:, None] & (c < C)[None, :], parts, strides, ACC)
        if total is not None:
            if coef is None:
                sum_1 += value
            else:
                weight = tl.load(coef + b.to(tl.int64) * coef_stride, b < B, 0).to(ACC)[:, None]
                sum_1 += tl.where(weight == 0, 0.0, weight * value)
        if moment is not None:
            sum_2 += value * value
        if signs is not None:
            sign = (value > 0).to(ACC) - (value < 0).to(ACC)
            count += tl.where(value == value, sign, value)
    to = (block // blocks).to(tl.int64) * C + c
    if total is not None:
        tl.store(total + to, tl.sum(sum_1, 0), c < C)
    if moment is not None:
        tl.store(moment + to, tl.sum(sum_2, 0), c < C)
    if signs is not None:
        tl.store(signs + to, tl.sum(count, 0), c < C)
