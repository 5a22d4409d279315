"""The kernel of the tile engine: gradients of examples, reduced tile by tile of the parameter."""

import triton
import triton.language as tl


@triton.jit
def coordinates(t, size, DIMS: tl.constexpr):
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


# The last batch of an epoch is smaller, and no reason to compile anew.
@triton.jit(do_not_specialize=["B"])
def reduce_tiles(
    x,
    g,
    coef,
    direction,
    sq_norms,
    dots,
    weighted_sum,
    sum_norms,
    second_moment,
    sign_sum,
    gradients,
    B,
    I,
    O,
    T,
    O_READ,
    K_READ,
    size,
    out_size,
    x_batch,
    x_channel,
    x_space,
    g_batch,
    g_channel,
    g_position,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    DIMS: tl.constexpr,
    TAPS: tl.constexpr,
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

    A group of channels has `O` outputs and `K = I * TAPS` columns, neighbours of which are channels
    of one tap. Examples lie `x_batch` and `g_batch` numbers apart, channels `x_channel` and
    `g_channel`, positions of `x` `x_space` along each dimension, those of `g` `g_position`. A
    linear layer is a convolution of one dimension with a kernel of one. `O_READ` rows and `K_READ`
    columns may be read; what lies past `O` and `K` has no part in the outputs.

    `coef` is `[B]`, read if `COEF`; `direction` `[groups * O, K]`. Outputs are `sq_norms` and
    `dots` `[tiles, B]`, `weighted_sum`, `second_moment` and `sign_sum` `[parts, groups * O, K]`,
    all to be added up, `sum_norms` `[tiles]` of the sum if there is one part, and `gradients`
    `[B, groups * O, K]`. `CHUNK` is the number of steps after
    which the accumulator is emptied into another, so that long sums keep their digits, or 0 for
    never. `OFFSET` is the type of offsets within an example and within the parameter, `ACC` that of
    sums.
    """
    K = I * TAPS
    rows, columns = tl.cdiv(O, BLOCK_O), tl.cdiv(K, BLOCK_K)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    group = (tile // (rows * columns)).to(tl.int64)
    all_rows = (tiles // (rows * columns)).to(tl.int64) * O
    row, column = _tile_of(tile % (rows * columns), rows, columns, 8)

    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    in_o, in_k = o < O, k < K
    read_o, read_k = o < O_READ, k < K_READ
    inside = in_o[:, None] & in_k[None, :]
    at_edge = (row + 1) * BLOCK_O > O or (column + 1) * BLOCK_K > K
    channel, tap = k % I, k // I
    if TAPS == 1:
        channel, tap = k, k * 0
    in_group = o.to(OFFSET)[:, None] * K + (channel * TAPS + tap)[None, :]

    taps = coordinates(tap, KERNEL, DIMS)
    g_o = o.to(OFFSET) * g_channel
    x_k = channel.to(OFFSET) * x_channel
    for d in tl.static_range(DIMS):
        x_k += (taps[d] * DILATION[d] - PADDING[d]).to(OFFSET) * x_space[d]

    # Parts are those of torch.tensor_split: the first ones have one example more.
    b = part * (B // parts) + min(part, B % parts)
    examples = B // parts + (part < B % parts).to(tl.int32)
    steps = tl.cdiv(T, BLOCK_T)
    x += group * I * x_channel
    g += group * O * g_channel

    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    whole = acc
    total = acc
    squares = acc
    signs = acc
    step = 0
    for _ in range(examples * steps):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        in_t = t < T
        at = coordinates(t, out_size, DIMS)
        x_t = tl.zeros((BLOCK_T,), OFFSET)
        seen = in_t[:, None] & read_k[None, :]
        for d in tl.static_range(DIMS):
            x_t += (at[d] * STRIDE[d]).to(OFFSET) * x_space[d]
            if PADDING[d] > 0:
                i = (at[d] * STRIDE[d])[:, None] + (taps[d] * DILATION[d] - PADDING[d])[None, :]
                seen &= (i >= 0) & (i < size[d])
        g_at = g + b * g_batch + (g_o[:, None] + (t.to(OFFSET) * g_position)[None, :])
        g_tile = tl.load(g_at, mask=read_o[:, None] & in_t[None, :], other=0.0)
        x_tile = tl.load(x + b * x_batch + (x_t[:, None] + x_k[None, :]), mask=seen, other=0.0)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        step += 1
        if CHUNK > 0 and (step % CHUNK == 0 or step == steps):
            whole += acc
            acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
        if step == steps:
            grad = whole if CHUNK > 0 else acc
            if at_edge:
                # Rows and columns past the edge meet zeros, which Inf turns into NaN.
                grad = tl.where(inside, grad, 0.0)
            if sq_norms is not None:
                tl.store(sq_norms + (tile.to(tl.int64) * B + b), tl.sum(grad * grad))
            if dots is not None:
                along = tl.load(direction + group * O * K + in_group, mask=inside, other=0.0)
                tl.store(dots + (tile.to(tl.int64) * B + b), tl.sum(grad * along))
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
                at_b = gradients + (b * all_rows + group * O) * K
                tl.store(at_b + in_group, grad, mask=inside)
            whole = tl.zeros((BLOCK_O, BLOCK_K), ACC)
            acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
        # Outside of the branch: addresses that depend on what it gives would keep loads from
        # running ahead, and each step would wait for its own.
        b += (step == steps).to(tl.int64)
        step = tl.where(step == steps, 0, step)

    at_part = (part * all_rows + group * O) * K
    if weighted_sum is not None:
        tl.store(weighted_sum + at_part + in_group, total, mask=inside)
        if sum_norms is not None:
            tl.store(sum_norms + tile, tl.sqrt(tl.sum(total * total)))
    if second_moment is not None:
        tl.store(second_moment + at_part + in_group, squares, mask=inside)
    if sign_sum is not None:
        tl.store(sign_sum + at_part + in_group, signs, mask=inside)
