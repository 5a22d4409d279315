"""Kernels of products of two Grams, of x and of g: tiles of the Gram matrix of gradients."""

import triton
import triton.language as tl

from pycoherence.triton_kernels.ghost.norms import dots, pair_of


@triton.jit
def _rows_of(tile, batch, T, splits, ROWS: tl.constexpr, P: tl.constexpr):
    """Examples and positions of the rows of a tile, `ROWS / P` groups of `P`, and which exist.

    An example has `splits` groups.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    group = row // P
    example, position = group // splits, group % splits * P + row % P
    return example.to(tl.int64), position.to(tl.int64), (example < batch) & (position < T)


@triton.jit
def _tiles_of(index, tiles, SAME: tl.constexpr):
    """Row and column of a tile of the matrix."""
    if SAME:
        return pair_of(index, tiles)
    else:
        return index // tiles, index % tiles


@triton.jit
def _keep(value, out, i, j, groups1, groups2, mask, SAME: tl.constexpr):
    """Store `[R1, R2]` at its place in `[groups1, groups2]`, and mirrored if that is symmetric."""
    a = i * value.shape[0] + tl.arange(0, value.shape[0])[:, None]
    b = j * value.shape[1] + tl.arange(0, value.shape[1])[None, :]
    mask &= (a < groups1) & (b < groups2)
    if SAME:
        mask &= a <= tl.where(i == j, b, groups1)  # half of a tile on the diagonal
        tl.store(out + b.to(tl.int64) * groups2 + a, value, mask=mask)
    tl.store(out + a.to(tl.int64) * groups2 + b, value, mask=mask)


@triton.jit
def _per_group(products, ROWS: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Sums over the positions of each pair of groups, `[ROWS / P1, ROWS / P2]`."""
    if P1 > 1 or P2 > 1:
        products = tl.sum(tl.reshape(products, (ROWS // P1, P1, ROWS)), 1)
        products = tl.sum(tl.reshape(products, (ROWS // P1, ROWS // P2, P2)), 2)
    return products


@triton.jit
def _dots(
    left,
    right,
    left_in,
    right_in,
    left_step,
    right_step,
    size,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Do as `dots` over all features; if `EXACT`, of factors that are converted to `ACC` first.

    Such factors are read a step before they are multiplied: Triton 3.6 does not compile a product
    of what is read and widened in the same step.
    """
    if EXACT:
        total = tl.zeros((ROWS, ROWS), ACC)
        a = tl.zeros((ROWS, DEPTH), tl.float32)
        b = tl.zeros((ROWS, DEPTH), tl.float32)
        for start in range(0, size + DEPTH, DEPTH):
            total = tl.dot(
                a.to(ACC), tl.trans(b.to(ACC)), total, input_precision=PRECISION, out_dtype=ACC
            )
            k = start + tl.arange(0, DEPTH)
            inside = (k < size)[None, :]
            k = k.to(tl.int64)[None, :]
            a = tl.load(left[:, None] + k * left_step, mask=left_in[:, None] & inside, other=0.0)
            b = tl.load(right[:, None] + k * right_step, mask=right_in[:, None] & inside, other=0.0)
            a, b = a.to(tl.float32), b.to(tl.float32)
    else:
        total = dots(
            left, right, left_in, right_in, left_step, right_step, 0, size, size,
            ROWS, DEPTH, False, ACC, PRECISION,
        )  # fmt: skip
    return total


@triton.jit
def multiply(
    x1,
    g1,
    x2,
    g2,
    out,
    sizes,
    doubt,
    B1,
    B2,
    T1,
    T2,
    splits1,
    splits2,
    I,
    O,
    tiles,
    x1_strides,
    g1_strides,
    x2_strides,
    g2_strides,
    limit,
    P1: tl.constexpr,
    P2: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH_X: tl.constexpr,
    DEPTH_G: tl.constexpr,
    SAME: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the Gram: dot products of rows of x, times those of g, summed over positions.

    Grid: tiles of the matrix, of pairs of tiles if it is `SAME`, thus symmetric. The rows of a tile
    are the positions of several examples, padded to `P1` and `P2` each; or `ROWS` of the positions
    of one example, which then has `splits1` rows or `splits2` columns in the result.

    `out` is `[B1 * splits1, B2 * splits2]`, with `tiles` in a row; `sizes` the same of absolute
    values, or `None`. If there is `doubt` `[B1, B2]`, only those elements are written where it
    exceeds `limit` or is NaN, from factors converted to `ACC`; tiles without one are skipped.
    """
    i, j = _tiles_of(tl.program_id(0), tiles, SAME)
    wanted = tl.full((ROWS // P1, ROWS // P2), True, tl.int1)
    if doubt is not None:
        b = (i * (ROWS // P1) + tl.arange(0, ROWS // P1)) // splits1
        c = (j * (ROWS // P2) + tl.arange(0, ROWS // P2)) // splits2
        at = b.to(tl.int64)[:, None] * B2 + c[None, :]
        value = tl.load(doubt + at, mask=(b < B1)[:, None] & (c < B2)[None, :], other=0.0)
        wanted = ~(tl.abs(value) <= limit)
        if tl.sum(wanted.to(tl.int32)) == 0:
            return
    b, t, in1 = _rows_of(i, B1, T1, splits1, ROWS, P1)
    c, s, in2 = _rows_of(j, B2, T2, splits2, ROWS, P2)
    x_left = x1 + b * x1_strides[0] + t * x1_strides[1]
    x_right = x2 + c * x2_strides[0] + s * x2_strides[1]
    of_x = _dots(
        x_left, x_right, in1, in2, x1_strides[2], x2_strides[2], I,
        doubt is not None, ROWS, DEPTH_X, ACC, PRECISION,
    )  # fmt: skip
    g_left = g1 + b * g1_strides[0] + t * g1_strides[1]
    g_right = g2 + c * g2_strides[0] + s * g2_strides[1]
    of_g = _dots(
        g_left, g_right, in1, in2, g1_strides[2], g2_strides[2], O,
        doubt is not None, ROWS, DEPTH_G, ACC, PRECISION,
    )  # fmt: skip
    # Rows that are not there are zeros, which Inf turns into NaN.
    product = tl.where(in1[:, None] & in2[None, :], of_x * of_g, 0.0)
    n1, n2 = B1 * splits1, B2 * splits2
    _keep(_per_group(product, ROWS, P1, P2), out, i, j, n1, n2, wanted, SAME)
    if sizes is not None:
        _keep(_per_group(tl.abs(product), ROWS, P1, P2), sizes, i, j, n1, n2, wanted, SAME)


@triton.jit
def partial(
    a1,
    a2,
    out,
    B1,
    B2,
    T1,
    T2,
    splits1,
    splits2,
    size,
    span,
    tiles,
    strides1,
    strides2,
    P1: tl.constexpr,
    P2: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SAME: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dot products of the rows of one factor over `span` of its features.

    Grid: (tiles as in `multiply`, spans). `out` is `[spans, tiles, ROWS, ROWS]`, and `span` a
    multiple of `DEPTH`.
    """
    i, j = _tiles_of(tl.program_id(0), tiles, SAME)
    b, t, in1 = _rows_of(i, B1, T1, splits1, ROWS, P1)
    c, s, in2 = _rows_of(j, B2, T2, splits2, ROWS, P2)
    left, right = (
        a1 + b * strides1[0] + t * strides1[1],
        a2 + c * strides2[0] + s * strides2[1],
    )
    first = tl.program_id(1) * span
    total = dots(
        left, right, in1, in2, strides1[2], strides2[2], first, min(first + span, size), size,
        ROWS, DEPTH, False, ACC, PRECISION,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + at * ROWS * ROWS + row[:, None] * ROWS + row[None, :], total)


@triton.jit
def merge(
    of_x,
    of_g,
    out,
    sizes,
    B1,
    B2,
    T1,
    T2,
    splits1,
    splits2,
    tiles,
    P1: tl.constexpr,
    P2: tl.constexpr,
    ROWS: tl.constexpr,
    SAME: tl.constexpr,
):
    """The result of `multiply`, from its tiles of dot products `[tiles, ROWS, ROWS]`."""
    i, j = _tiles_of(tl.program_id(0), tiles, SAME)
    _, _, in1 = _rows_of(i, B1, T1, splits1, ROWS, P1)
    _, _, in2 = _rows_of(j, B2, T2, splits2, ROWS, P2)
    row = tl.arange(0, ROWS)
    at = tl.program_id(0).to(tl.int64) * ROWS * ROWS + row[:, None] * ROWS + row[None, :]
    product = tl.load(of_x + at) * tl.load(of_g + at)
    product = tl.where(in1[:, None] & in2[None, :], product, 0.0)
    all_of = tl.full((ROWS // P1, ROWS // P2), True, tl.int1)
    n1, n2 = B1 * splits1, B2 * splits2
    _keep(_per_group(product, ROWS, P1, P2), out, i, j, n1, n2, all_of, SAME)
    if sizes is not None:
        _keep(_per_group(tl.abs(product), ROWS, P1, P2), sizes, i, j, n1, n2, all_of, SAME)
