"""The kernel of the tile engine: gradients of examples, reduced tile by tile of the parameter."""

import triton
import triton.language as tl

from pycoherence.triton_kernels.launch.finish import norm_of


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


@triton.jit
def _columns(k, I, TAPS: tl.constexpr):
    """Input channel and tap of columns `k`."""
    if TAPS == 1:
        return k, k * 0
    else:
        return k % I, k // I


@triton.jit
def _places(
    row,
    column,
    O,
    I,
    TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The places of the numbers of a tile in a group of channels, and which are there.

    It is computed where it is needed: it would take registers of all steps.
    """
    o = row * BLOCK_O + tl.arange(0, BLOCK_O)
    k = column * BLOCK_K + tl.arange(0, BLOCK_K)
    channel, tap = _columns(k, I, TAPS)
    at = o.to(OFFSET)[:, None] * (I * TAPS) + (channel * TAPS + tap)[None, :]
    return at, (o < O)[:, None] & (k < I * TAPS)[None, :]


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
    DESCRIBED: tl.constexpr,
    EDGES: tl.constexpr,
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

    A group of channels has `O` outputs and `K = I * TAPS` columns; neighbours are channels
    of one tap. Examples lie `x_batch` and `g_batch` numbers apart, channels `x_channel` and
    `g_channel`, positions of `x` `x_space` along each dimension, those of `g` `g_position`. A
    linear layer is a convolution of one dimension with a kernel of one. `O_READ` rows and `K_READ`
    columns may be read; what lies past `O` and `K` has no part in the outputs. If they are
    `DESCRIBED`, `x` and `g` are descriptors of `[B, T, I]` and `[B, T, O]`, of one group and a
    kernel of one: the GPU computes addresses and puts zeros past the edges.

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

    at_edge = EDGES and ((row + 1) * BLOCK_O > O or (column + 1) * BLOCK_K > K)
    if not DESCRIBED:
        o = row * BLOCK_O + tl.arange(0, BLOCK_O)
        k = column * BLOCK_K + tl.arange(0, BLOCK_K)
        read_o, read_k = o < O_READ, k < K_READ
        channel, tap = _columns(k, I, TAPS)
        taps = coordinates(tap, KERNEL, DIMS)
        x += group * I * x_channel
        g += group * O * g_channel
        g_o = o.to(OFFSET) * g_channel
        x_k = channel.to(OFFSET) * x_channel
        for d in tl.static_range(DIMS):
            x_k += (taps[d] * DILATION[d] - PADDING[d]).to(OFFSET) * x_space[d]

    # Parts are those of torch.tensor_split: the first ones have one example more.
    b = part * (B // parts) + min(part, B % parts)
    examples = B // parts + (part < B % parts).to(tl.int32)
    steps = tl.cdiv(T, BLOCK_T)

    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    whole = acc
    weighted_sum_acc = acc
    second_moment_acc = acc
    sign_sum_acc = acc
    step = 0
    for _ in range(examples * steps):
        if DESCRIBED:
            example, first = b.to(tl.int32), step * BLOCK_T
            g_tile = g.load([example, first, row * BLOCK_O]).reshape(BLOCK_T, BLOCK_O).trans()
            x_tile = x.load([example, first, column * BLOCK_K]).reshape(BLOCK_T, BLOCK_K)
        else:
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
            # Rows and columns past the edge are zeros. Zeros that meet Inf are NaN, which sums then
            # show; to leave them out of all sums would make each product wait for the one before.
            if sq_norms is not None:
                norm = tl.sum(grad * grad)
                if EDGES and at_edge and norm != norm:
                    _at, inside = _places(row, column, O, I, TAPS, BLOCK_O, BLOCK_K, OFFSET)
                    norm = tl.sum(tl.where(inside, grad * grad, 0.0))
                tl.store(sq_norms + (tile.to(tl.int64) * B + b), norm)
            if dots is not None:
                to, inside = _places(row, column, O, I, TAPS, BLOCK_O, BLOCK_K, OFFSET)
                along = tl.load(direction + group * O * K + to, mask=inside, other=0.0)
                dot = tl.sum(grad * along)
                if EDGES and at_edge and dot != dot:
                    dot = tl.sum(tl.where(inside, grad * along, 0.0))
                tl.store(dots + (tile.to(tl.int64) * B + b), dot)
            if weighted_sum is not None:
                if COEF:
                    c = tl.load(coef + b)
                    weighted_sum_acc += tl.where(c == 0.0, 0.0, c * grad)
                else:
                    weighted_sum_acc += grad
            if second_moment is not None:
                second_moment_acc += grad * grad
            if sign_sum is not None:
                sign_sum_acc += tl.where(grad > 0.0, 1.0, tl.where(grad < 0.0, -1.0, grad))
            if gradients is not None:
                to, inside = _places(row, column, O, I, TAPS, BLOCK_O, BLOCK_K, OFFSET)
                at_b = gradients + (b * all_rows + group * O) * K
                tl.store(at_b + to, grad, mask=inside)
            if CHUNK > 0:
                whole = tl.zeros((BLOCK_O, BLOCK_K), ACC)
            else:
                acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
        # Outside of the branch: addresses that depend on what it gives would keep loads from
        # running ahead, and each step would wait for its own.
        b += (step == steps).to(tl.int64)
        step = tl.where(step == steps, 0, step)

    at_part = (part * all_rows + group * O) * K
    to, inside = _places(row, column, O, I, TAPS, BLOCK_O, BLOCK_K, OFFSET)
    if weighted_sum is not None:
        tl.store(weighted_sum + at_part + to, weighted_sum_acc, mask=inside)
        if sum_norms is not None:
            if EDGES:
                weighted_sum_acc = tl.where(inside, weighted_sum_acc, 0.0)
            tl.store(sum_norms + tile, norm_of(weighted_sum_acc))
    if second_moment is not None:
        tl.store(second_moment + at_part + to, second_moment_acc, mask=inside)
    if sign_sum is not None:
        tl.store(sign_sum + at_part + to, sign_sum_acc, mask=inside)
