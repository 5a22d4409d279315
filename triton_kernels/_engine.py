"""The kernel of the tile engine: gradients of examples, reduced tile by tile of the parameter."""

import triton
import triton.language as tl


@triton.jit
def _coordinates(t, size, DIMS: tl.constexpr):
    """Coordinates of flat positions `t` of a grid of `size`, the last one fastest."""
    if DIMS == 1:
        return (t,)
    elif DIMS == 2:
        return t // size[1], t % size[1]
    elif DIMS == 3:
        return t // (size[1] * size[2]), t // size[2] % size[1], t % size[2]
    else:
        return (
            t // (size[1] * size[2] * size[3]),
            t // (size[2] * size[3]) % size[1],
            t // size[3] % size[2],
            t % size[3],
        )


@triton.jit
def _tile_of(program, rows, columns, TALL: tl.constexpr):
    """Row and column of a tile; programs that run together share what they read."""
    band = program // (TALL * columns)
    height = min(rows - band * TALL, TALL)
    within = program % (TALL * columns)
    return band * TALL + within % height, within // height


@triton.jit
def reduce_tiles(
    x,
    g,
    coef,
    direction,
    sq_norms,
    dots,
    weighted_sum,
    second_moment,
    sign_sum,
    gradients,
    B,
    I,
    O,
    T,
    size,
    out_size,
    x_batch,
    x_channel,
    x_space,
    g_batch,
    g_channel,
    g_space,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DIMS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_FIRST: tl.constexpr,
    COEF: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    OFFSET: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the parameter, for one part of the batch.

    Grid: (tiles of all groups of channels, parts of the batch). A program multiplies the factors of
    its examples, `BLOCK_T` positions at a time, into a tile `[BLOCK_O, BLOCK_K]` of the gradient,
    which it reduces at the end of each example. All steps of all examples are one loop, so that
    loads run ahead over the ends of examples. An output that is `None` is not wanted.

    A parameter has O outputs and `K = I * TAPS` columns in each group. Examples lie `x_batch` and
    `g_batch` numbers apart. A linear layer is a convolution of one dimension with a kernel of one.

    Args:
        x: Input, channels and positions at the given strides.
        g: Output gradient, likewise.
        coef: `[B]`, read if `COEF`.
        direction: `[groups * O, K]`.
        sq_norms: `[B, tiles]`, partial; so is `dots`.
        weighted_sum: `[parts, groups * O, K]`, partial; so are `second_moment` and `sign_sum`.
        gradients: `[B, groups * O, K]`.
        TAPS_FIRST: Whether neighbours in `BLOCK_K` are channels, not taps of the kernel.
        CHUNK: Steps after which the accumulator is emptied into another, so that long sums keep
            their digits; 0 for never.
        OFFSET: Type of offsets within an example.
        ACC: Type of sums.
        PRECISION: Of float32 products.
    """
    K = I * TAPS
    rows, columns = tl.cdiv(O, BLOCK_O), tl.cdiv(K, BLOCK_K)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    group = (tile // (rows * columns)).to(tl.int64)
    row, column = _tile_of(tile % (rows * columns), rows, columns, 8)

    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    in_o, in_k = o < O, k < K
    inside = in_o[:, None] & in_k[None, :]
    if TAPS == 1:
        channel, tap = k, k * 0
    elif TAPS_FIRST:
        channel, tap = k % I, k // I
    else:
        channel, tap = k // TAPS, k % TAPS
    in_parameter = (group * O + o).to(tl.int64)[:, None] * K + (channel * TAPS + tap)[None, :]

    taps = _coordinates(tap, KERNEL, DIMS)
    g += group * O * g_channel
    x += group * I * x_channel
    g_o = o.to(OFFSET) * g_channel
    x_k = channel.to(OFFSET) * x_channel
    for d in tl.static_range(DIMS):
        x_k += (taps[d] * DILATION[d] - PADDING[d]).to(OFFSET) * x_space[d]

    steps = tl.cdiv(T, BLOCK_T)
    # Parts are those of torch.tensor_split: the first ones have one example more.
    b = part * (B // parts) + min(part, B % parts)
    examples = B // parts + (part < B % parts).to(tl.int32)

    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    if CHUNK:
        whole = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    if weighted_sum is not None:
        total = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    if second_moment is not None:
        squares = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    if sign_sum is not None:
        signs = tl.zeros((BLOCK_O, BLOCK_K), ACC)

    step = 0
    for _ in range(examples * steps):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        in_t = t < T
        at = _coordinates(t, out_size, DIMS)
        g_t = tl.zeros((BLOCK_T,), OFFSET)
        x_t = tl.zeros((BLOCK_T,), OFFSET)
        seen = in_t[:, None] & in_k[None, :]
        for d in tl.static_range(DIMS):
            g_t += at[d].to(OFFSET) * g_space[d]
            x_t += (at[d] * STRIDE[d]).to(OFFSET) * x_space[d]
            if PADDING[d] > 0:
                tap_at = taps[d] * DILATION[d] - PADDING[d]
                i = (at[d] * STRIDE[d])[:, None] + tap_at[None, :]
                seen &= (i >= 0) & (i < size[d])
        g_tile = tl.load(
            g + b * g_batch + (g_o[:, None] + g_t[None, :]),
            mask=in_o[:, None] & in_t[None, :],
            other=0.0,
        )
        x_tile = tl.load(x + b * x_batch + (x_t[:, None] + x_k[None, :]), mask=seen, other=0.0)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        step += 1
        if CHUNK:
            if step % CHUNK == 0 or step == steps:
                whole += acc
                acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
        if step == steps:
            if CHUNK:
                grad = whole
            else:
                grad = acc
            # Rows and columns past the edge meet zeros, which Inf turns into NaN.
            grad = tl.where(inside, grad, 0.0)
            if sq_norms is not None:
                tl.store(sq_norms + b * tiles + tile, tl.sum(grad * grad))
            if dots is not None:
                along = tl.load(direction + in_parameter, mask=inside, other=0.0)
                tl.store(dots + b * tiles + tile, tl.sum(grad * along))
            if weighted_sum is not None:
                if COEF:
                    c = tl.load(coef + b)
                    total += tl.where(c == 0.0, 0.0, c * grad)
                else:
                    total += grad
            if second_moment is not None:
                squares += grad * grad
            if sign_sum is not None:
                signs += tl.where(grad > 0.0, 1.0, tl.where(grad < 0.0, -1.0, grad))
            if gradients is not None:
                size_of_one = (tiles // (rows * columns)).to(tl.int64) * O * K
                tl.store(gradients + b * size_of_one + in_parameter, grad, mask=inside)
            if CHUNK:
                whole = tl.zeros((BLOCK_O, BLOCK_K), ACC)
            acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
            step = 0
            b += 1

    offset = part * (tiles // (rows * columns)) * O * K + in_parameter
    if weighted_sum is not None:
        tl.store(weighted_sum + offset, total, mask=inside)
    if second_moment is not None:
        tl.store(second_moment + offset, squares, mask=inside)
    if sign_sum is not None:
        tl.store(sign_sum + offset, signs, mask=inside)
