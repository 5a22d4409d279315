"""Sums of outer products, `sum_n f(g_n) f(x_n)^T`: what needs no boundaries between examples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.triton_kernels.engine.tiles import LONG, kind_of, parts_of, seconds_of, tile_for
from pycoherence.triton_kernels.launch.device import device_of, launch, precision
from pycoherence.triton_kernels.launch.finish import Finish, SumRequest, norm_of
from pycoherence.triton_kernels.launch.host import cdiv


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def _ones(where, DTYPE: tl.constexpr):
    return tl.where(where, 1.0, 0.0).to(DTYPE)


@triton.jit(do_not_specialize=["N"])
def add_products(
    x,
    g,
    coef,
    out,
    norms,
    N,
    I,
    O,
    x_row,
    x_column,
    g_row,
    g_column,
    TRANSFORM: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the sum over one part of the rows.

    Grid: (tiles, parts of the rows). `x` is `[N, I]`, `g` `[N, O]`, `coef` `[N]`, `out`
    `[parts, O, I]`, to be added up, and `norms` `[tiles]` of the sum if there is one part.
    `TRANSFORM` is `"plain"`; `"scale"`, by `coef`, where rows with a coefficient of zero are left
    out; `"square"`, of factors made alike in size by `coef`, with which one is multiplied and the
    other divided; or `"sign"`, where Inf times zero is NaN still. Products are of numbers in
    `DTYPE`; `CHUNK` is as in the tile engine.
    """
    tile, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows = tl.cdiv(O, BLOCK_O)
    o = tile % rows * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile // rows * BLOCK_K + tl.arange(0, BLOCK_K)
    in_o, in_i = o < O, i < I
    steps = tl.cdiv(N, BLOCK_T)
    first = part * (steps // parts) + min(part, steps % parts)
    count = steps // parts + (part < steps % parts).to(tl.int32)

    acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    whole = acc
    for step in range(count):
        n = (first + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_n = n < N
        if TRANSFORM == "scale":
            c = tl.load(coef + n, mask=in_n, other=0.0)
            in_n &= c != 0.0
        n = n.to(tl.int64)
        g_at = g + o.to(tl.int64)[:, None] * g_column + n[None, :] * g_row
        x_at = x + n[:, None] * x_row + i.to(tl.int64)[None, :] * x_column
        g_tile = tl.load(g_at, mask=in_o[:, None] & in_n[None, :], other=0.0).to(DTYPE)
        x_tile = tl.load(x_at, mask=in_n[:, None] & in_i[None, :], other=0.0).to(DTYPE)
        if TRANSFORM == "scale":
            g_tile = g_tile * c[None, :].to(DTYPE)
        elif TRANSFORM == "square":
            c = tl.load(coef + n, mask=in_n, other=1.0)
            g_tile, x_tile = g_tile * c[None, :], x_tile * (1.0 / c)[:, None]
            g_tile, x_tile = g_tile * g_tile, x_tile * x_tile
        elif TRANSFORM == "sign":
            if tl.max(tl.abs(g_tile)) == float("inf") or tl.max(tl.abs(x_tile)) == float("inf"):
                g_inf, x_inf = tl.abs(g_tile) == float("inf"), tl.abs(x_tile) == float("inf")
                bad = tl.dot(_ones(g_inf, DTYPE), _ones(x_tile == 0.0, DTYPE))
                bad = tl.dot(_ones(g_tile == 0.0, DTYPE), _ones(x_inf, DTYPE), bad)
                whole += tl.where(bad > 0.0, float("nan"), 0.0)
            g_tile, x_tile = _sign(g_tile).to(DTYPE), _sign(x_tile).to(DTYPE)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if CHUNK > 0 and (step % CHUNK == CHUNK - 1 or step == count - 1):
            whole += acc
            acc = tl.zeros((BLOCK_O, BLOCK_K), ACC)
    at = (part.to(tl.int64) * O + o)[:, None] * I + i[None, :]
    whole = whole if CHUNK > 0 else whole + acc
    tl.store(out + at, whole, mask=in_o[:, None] & in_i[None, :])
    if norms is not None:
        # Rows and columns past the edge are sums of zeros times numbers that may not be finite.
        tl.store(norms + tile, norm_of(tl.where(in_o[:, None] & in_i[None, :], whole, 0.0)))


def sum_of_products(
    x: Tensor,
    g: Tensor,
    finish: Finish,
    transform: str = "plain",
    coef: Tensor | None = None,
    request: SumRequest | None = None,
) -> Tensor:
    """`sum_n f(g_n) f(x_n)^T`, `[O, I]`.

    Args:
        x: `[N, I]`, any strides.
        g: `[N, O]`, same dtype.
        finish: Adds up parts.
        transform: `"plain"`; `"scale"`, each term by its coefficient; `"square"` or `"sign"`, of
            both factors, which is that of each number of a term.
        coef: `[N]` for `"scale"`.
        request: How it is wanted, if it is the weighted sum.
    """
    if transform == "square":
        coef = _between(x, g)
    (n, i), o = x.shape, g.shape[1]
    acc = accumulate_dtype(x.dtype)
    if not x.numel() or not g.numel():
        return x.new_zeros(o, i, dtype=acc)
    request = request or SumRequest()
    # Scaled or squared, numbers of half precision have more digits than fit it.
    exact = transform in ("plain", "sign")
    dtype = x.dtype if exact else acc
    # Signs have digits enough in TensorFloat-32.
    signs = transform == "sign" and x.dtype == torch.float32
    how = "tf32" if signs else precision(x.dtype)
    # Sums of signs are whole numbers, which lose nothing.
    device, long = device_of(x), n > LONG and transform != "sign"
    beside = 3 if transform == "sign" else int(long)
    tile = tile_for(device, dtype, how, o, i, beside)
    tiles = cdiv(o, tile.o) * cdiv(i, tile.k)
    sum_bytes = o * i * acc.itemsize
    room = max(1, workspace(x.device) // sum_bytes)
    each = seconds_of(kind_of(dtype, how), tile, tile.t)
    parts = parts_of(device, cdiv(n, tile.t), tiles, min(room, 65535), each, sum_bytes)
    if parts == 1:
        out, norms = request.empty(x, (1, o, i)), request.norms_of(x, tiles)
    else:
        out, norms = x.new_empty(parts, o, i, dtype=acc), None
    launch(
        add_products,
        (tiles, parts),
        *(x, g, None if coef is None else coef.to(acc).contiguous(), out, norms),
        *(n, i, o, *x.stride(), *g.stride()),
        TRANSFORM=transform,
        BLOCK_O=tile.o,
        BLOCK_K=tile.k,
        BLOCK_T=tile.t,
        CHUNK=LONG // tile.t if long else 0,
        DTYPE=_TYPES[dtype],
        ACC=_TYPES[acc],
        PRECISION=how,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out[0] if parts == 1 else finish.like_parameter(out, request)


def _between(x: Tensor, g: Tensor) -> Tensor:
    """For each row the power of two that makes the largest of g and x alike, `[N]`.

    Their squares then leave the range of the dtype no sooner than those of their products.
    """
    acc = accumulate_dtype(x.dtype)
    most = [torch.linalg.vector_norm(each, torch.inf, 1, dtype=acc) for each in (x, g)]
    logs = [each.where((each > 0) & each.isfinite(), 1.0).log2() for each in most]
    # Neither a scale nor its reciprocal leaves the range.
    limit = 1022 if acc == torch.float64 else 126
    return ((logs[0] - logs[1]) / 2).round().clamp(-limit, limit).exp2()


_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
