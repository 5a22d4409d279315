"""Tables on paper: what large groups would send, from the formulas and a bandwidth.

This is arithmetic, not a measurement: no latency, nothing sent while something is computed, and no
two messages on one wire.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

from bench.distributed import formulas
from bench.distributed.formulas import Parameter, Parameters, Place, Received
from bench.shared.results import table

WIDTH = 4096
RANKS = (8, 64, 256, 1024)
BATCHES = ((8, 1), (64, 1), (8, 1024), (64, 1024))
"""Examples of each rank, and positions of each example."""

BANDWIDTH = 50e9
"""Bytes that come to each rank in a second."""

FACTOR, GRADIENT = 2, 4
"""Bytes of factors in bfloat16, as under autocast, and of gradients in float32."""


ROWS: dict[str, Callable[[Parameters, Place], Received]] = {
    "plain DDP": formulas.wrapper,
    "beside it: `SqNorms`": formulas.sq_norms,
    "`Moments`": formulas.moments,
    '`Dots("mean")`': formulas.dots_with_mean,
    "`Gram`": formulas.gram,
    "`Winsorized`": partial(formulas.coordinate_rule, averaged=True),
    "in place of it: `Krum`": partial(formulas.krum, m=1),
    "`NormClip`": formulas.norm_clip,
}


def tables(
    width: int = WIDTH, bandwidth: float = BANDWIDTH, ranks: Sequence[int] = RANKS
) -> Iterator[str]:
    """One for each batch: millions of numbers, and milliseconds at a bandwidth, as Markdown.

    Args:
        width: Inputs and outputs of the linear layer, which has no bias.
        bandwidth: Bytes that come to each rank in a second.
        ranks: How many there are, a column for each.
    """
    # The last rank gets what the first decides, and all slices are of one size.
    short = Fraction(FACTOR, GRADIENT)
    yield (
        f"A linear layer of {width} x {width}, factors of {FACTOR} bytes and gradients of "
        f"{GRADIENT}, {bandwidth / 1e9:g} GB/s to each rank; millions of numbers that it receives, "
        "and milliseconds. **Arithmetic, not a measurement.**"
    )
    for batch, positions in BATCHES:
        weight = Parameter(width, width, positions)
        places = [Place((batch,) * n, n - 1, short) for n in ranks]
        head = [f"`B_r={batch}`, `T={positions}`", *(f"`R={n}`" for n in ranks)]
        rows = [
            [name, *(_cell(received([weight], at), bandwidth) for at in places)]
            for name, received in ROWS.items()
        ]
        way = ["way of exchange", *(_way(weight, at) for at in places)]
        yield from ("", *table(head, [*rows, way]))
    header = ", ".join(f"{(n - 1) * formulas.WIDTH * 8 / 1e3:.3g} kB for {n}" for n in ranks)
    yield from ("", f"One header from every other rank: {header}.")


def _cell(received: Received, bandwidth: float) -> str:
    milliseconds = float(received.bytes(FACTOR, GRADIENT)) / bandwidth * 1e3
    return f"{_short(float(received.numbers) / 1e6)} M, {_short(milliseconds)} ms"


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _way(weight: Parameter, at: Place) -> str:
    return "gradients" if formulas.channels(weight, at) is None else "factors"
