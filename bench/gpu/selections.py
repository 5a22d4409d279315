"""Headline figures of kernels that select, beside materialised gradients that are sorted."""

from collections.abc import Callable

import torch
from torch import Tensor

import pycoherence as pc
from bench.gpu import predicted
from bench.gpu.products import BOTH, Figure, reduced
from bench.ops.cases import in_float64
from bench.ops.plain import linear_order as plain

EXTREMES: dict[str, Callable[[int, float], float]] = {
    # k + 1 values at either end, a minimum and a maximum at each
    "winsorized_mean": lambda batch, k: batch * 4 * (k + 1),
    # an odd-even merge sort of a power of two
    "median": lambda batch, k: _sort((batch - 1).bit_length()),
    "sign_agreement": lambda batch, k: 0,
}
"""Minima and maxima for the values of one coordinate."""

PLAIN = {"winsorized_mean": "sort", "median": "sort", "sign_agreement": "materialised"}
"""How torch does it, from gradients that are materialised, 64 MiB at a time."""


def _sort(levels: int) -> float:
    return 2.0 * ((levels**2 - levels + 4) * 2 ** (levels - 2) - 1)


def order(
    new: Callable[..., Tensor],
    rule: str,
    k: float,
    b: int,
    t: int,
    size: int,
    seconds: float | None = None,
) -> Figure:
    """A rule of the gradients of a square layer against materialising and sorting them."""
    x, g = new(b, t, size), new(b, t, size)
    args = (x, g, rule, k, False)
    way = plain.WAYS[PLAIN[rule]].run
    return Figure(
        "linear_order",
        f"{rule}{f' {k:g}' if k else ''}, B={b} T={t} {size}x{size}",
        args,
        lambda: (torch.ops.pycoherence.linear_order(*args),),
        lambda: way(frozenset({rule}), x=x, g=g, rule=rule, k=k, drop=False),
        lambda: tuple(in_float64(pc.ops.specs["linear_order"], (rule,), args).values()),
        goal=None if seconds is None else 1 / 50,
        seconds=seconds,
        bytes=_bytes(x, g) + 4.0 * size**2,
        extremes=size**2 * EXTREMES[rule](b, k),
        predicted=max(
            predicted.by_bytes(_bytes(x, g) + 4.0 * size**2),
            predicted.by_extremes(size**2 * EXTREMES[rule](b, k)),
        ),
    )


def embedding(new: Callable[..., Tensor], b: int, t: int, rows: int, width: int) -> Figure:
    """Norms and gradient of a table against the gradient."""
    g = new(b, t, width)
    ids = torch.randint(rows, (b, t), device=g.device)
    args, ours, truth = reduced("embedding_reduce", (ids, g, rows, -1), BOTH)
    return Figure(
        "embedding_reduce",
        f"norms + gradient of the table, B={b} T={t} {rows}x{width}",
        args,
        ours,
        lambda: torch.ops.aten.embedding_dense_backward(g, ids, rows, -1, False),
        truth,
        bytes=_bytes(ids, g) + 4.0 * rows * width,
    )


def _bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))
