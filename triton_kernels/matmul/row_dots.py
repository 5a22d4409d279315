"""Dot products of per-example gradients with a direction, by a product of matrices.

`<G_b, V> = sum_t g_bt^T (V x_bt)`: the gradients are never there. The product `V x` is added up in
float32 (float64) as `precision` says, and is never stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.triton_kernels.launch.device import device_of, launch, precision
from pycoherence.triton_kernels.launch.host import cdiv


class Tiles(NamedTuple):
    """Tile of a program, and how it runs.

    Attributes:
        rows: Rows of `x` and `g`.
        outputs: Rows of the direction.
        depth: Columns of both that a step multiplies.
        warps: Warps of a program.
        stages: Stages of the pipeline.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


def row_dots(x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """`sum_t g_bt^T V x_bt`, `[B]`, at the cost of one product of matrices.

    Args:
        x: `[B, T, I]`, any strides.
        g: `[B, T, O]`, of the same dtype.
        v: `[O, I]`, any strides; in the accumulation dtype, in which the result is.
    """
    (b, t, i), o = x.shape, g.shape[2]
    if 0 in (b, t, i, o):
        return x.new_zeros(b, dtype=accumulate_dtype(x.dtype))
    of = tiles(x.dtype, b * t, device_of(x).capability)
    across = cdiv(o, of.outputs)
    blocks = across * cdiv(b * t, of.rows)
    parts = min(cdiv(2 * device_of(x).processors, blocks), cdiv(i, 4 * of.depth))
    depth = cdiv(cdiv(i, parts), of.depth) * of.depth
    parts = cdiv(i, depth)
    partial = x.new_empty((b, t, across * parts), dtype=accumulate_dtype(x.dtype))
    launch(
        _row_dots,
        (blocks * parts,),
        *(x, g, v, partial, b * t, t, i, o, depth, across * parts),
        *(x.stride(), g.stride(), v.stride()),
        TILE=(of.rows, of.outputs, of.depth),
        PRECISION=precision(x.dtype),
        warps=of.warps,
        stages=of.stages,
    )
    return partial.flatten(1).sum(1)


def tiles(dtype: torch.dtype, rows: int, capability: int) -> Tiles:
    """The tile for a product of `rows` rows; none of them spills registers."""
    if dtype == torch.float64:
        return Tiles(64 if rows > 32 else 32, 64, 16, 8, 3)
    if precision(dtype) == "ieee":
        return Tiles(64 if rows > 32 else 32, 64, 32, 4, 3)
    if rows <= 64:
        return Tiles(64 if rows > 32 else 32, 64, 32, 8 if rows > 32 else 4, 3)
    # Three products keep parts of both factors in registers where these feed the tensor cores.
    split = capability < 90 and precision(dtype) == "tf32x3"
    return Tiles(128, 64 if split else 128, 32, 8, 3)


@triton.jit(do_not_specialize=["rows"])
def _row_dots(
    x,
    g,
    v,
    partial,
    rows,
    T,
    I,
    O,
    depth,
    width,
    x_strides,
    g_strides,
    v_strides,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program multiplies TILE[0] rows (b, t) by TILE[1] outputs over `depth` of the inputs.

    x [B, T, I], g [B, T, O], v [O, I]; partial [B, T, width] holds a sum over outputs for each of
    cdiv(O, TILE[1]) tiles and cdiv(I, depth) parts.
    """
    ACC: tl.constexpr = partial.dtype.element_ty
    # Eight blocks of rows at a time share what they read of v.
    across = tl.cdiv(O, TILE[1])
    below = tl.cdiv(rows, TILE[0])
    group, place = tl.program_id(0) // (8 * width), tl.program_id(0) % (8 * width)
    high = tl.minimum(below - 8 * group, 8)
    column = place // high
    row = (8 * group + place % high).to(tl.int64) * TILE[0] + tl.arange(0, TILE[0])
    o = column % across * TILE[1] + tl.arange(0, TILE[1])
    first = column // across * depth
    b, t = row // T, row % T
    x += b * x_strides[0] + t * x_strides[1]
    g += b * g_strides[0] + t * g_strides[1]
    v += o.to(tl.int64) * v_strides[0]
    acc = tl.full((TILE[0], TILE[1]), 0, ACC)
    for start in range(first, tl.minimum(first + depth, I), TILE[2]):
        i = start + tl.arange(0, TILE[2])
        along = i.to(tl.int64)
        here = (row < rows)[:, None] & (i < I)[None, :]
        left = tl.load(x[:, None] + along[None, :] * x_strides[2], here, 0).to(ACC)
        here = (i < I)[:, None] & (o < O)[None, :]
        right = tl.load(v[None, :] + along[:, None] * v_strides[1], here, 0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    inside = (row < rows)[:, None] & (o < O)[None, :]
    value = tl.load(g[:, None] + o.to(tl.int64)[None, :] * g_strides[2], inside, 0).to(ACC)
    # A row that is not finite is so outside too.
    dots = tl.sum(tl.where(inside, value * acc, 0.0), 1)
    tl.store(partial + row * width + column, dots, row < rows)
