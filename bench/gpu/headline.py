"""Measures the kernels that matter most beside what the GPU does anyway: cuBLAS, cuDNN and sorts.

    python -m bench headline [--device cpu] [--quick] [--first N] [--out FILE]

Each is the time of an op as a multiple of what torch takes on the same numbers: norms with the
weight gradient against the weight gradient alone, the Gram matrix of rank-one gradients against the
Grams of their factors, order statistics against materialised gradients that are sorted. Beside it
stands the least that the GPU allows, for bytes and for minima and maxima, what an H200 was
predicted to take, and the time of the host. On a GPU both sides run as CUDA graphs, if they can be
captured. Wrong results are not timed. Rows are JSON lines.
"""

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

import pycoherence as pc
from bench.gpu.products import Figure, conv, engine, gram, linear
from bench.gpu.selections import embedding, order
from bench.shared import options, results
from bench.shared.results import Row
from bench.shared.timing import host_seconds_of, replayed, seconds_of
from pycoherence.ops.core.dispatch import fastest

LIMIT = 1e-5
"""Allowed error over the largest value."""

TURNS = 15
"""Runs of both, in turns; figures are medians. Fewer, but three, if they take `LONG`."""

LONG = 3.0
"""Seconds."""

SHORTEST = 2e-3
"""Runs are repeated until they take this number of seconds."""

EXTREMES = 64
"""Minima and maxima of float32 in a cycle of one processor of a GPU."""


NORMS = ("sq_norms",)


def headlines(device: str, quick: bool) -> Iterator[Figure]:
    """The most valuable first."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def new32(*shape: int) -> Tensor:
        return new(*shape, dtype=torch.float32)

    if quick:
        yield linear(new, 3, 5, 16, 1 / 0.75)
        yield linear(new, 3, 1, 16, wanted=NORMS)
        yield gram(new, 5, 16, 2)
        yield order(new, "winsorized_mean", 2, 7, 1, 16)
        yield order(new, "median", 0, 7, 1, 16)
        yield order(new, "sign_agreement", 0.5, 7, 1, 16)
        yield embedding(new, 3, 9, 11, 8)
        yield conv(new32, 2, 4, 6)
        yield conv(new32, 2, 4, 6, 4)
        return
    yield engine(new, 32, 512, 4096, 1 / 0.75)
    yield engine(new, 32, 512, 768, 1 / 0.6)
    yield linear(new, 32, 512, 4096, 1 / 0.75)
    yield linear(new, 32, 512, 768, 1 / 0.6)
    yield gram(new, 2048, 4096, 2)
    yield order(new, "winsorized_mean", 2, 128, 1, 4096, 3.5e-3)
    yield order(new, "median", 0, 128, 1, 4096, 5e-3)
    yield order(new, "sign_agreement", 0.5, 128, 1, 4096, 1e-4)
    yield embedding(new, 32, 1024, 50257, 768)
    for batch, positions, size in (
        (32, 512, 4096),
        (32, 512, 768),
        (64, 128, 4096),
        (2048, 1, 4096),
    ):
        yield linear(new, batch, positions, size, wanted=NORMS)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield conv(new, 128, channels, size)
    yield conv(new, 128, 144, 56, 144)
    yield order(new, "winsorized_mean", 2, 32, 128, 1024)
    yield linear(new32, 32, 512, 768)
    yield gram(new32, 2048, 1024)


def measure(found: Figure) -> Row:
    """A row of results."""
    row: Row = {"op": found.op, "what": found.what, "goal": found.goal}
    dtype = next(x.dtype for x in found.args if isinstance(x, Tensor) and x.is_floating_point())
    row["dtype"] = str(dtype).removeprefix("torch.")
    row["backend"] = fastest(pc.ops.specs[found.op], found.args[0].device.type, found.args).name
    try:
        pairs = list(zip(found.ours(), found.truth(), strict=True))
    except RuntimeError as error:  # out of memory, say: the next rows may still be had
        return row | {"error": str(error).splitlines()[0], "check": "failed"}
    row["error"] = max(((o - t).abs().max() / t.abs().max()).item() for o, t in pairs)
    row["check"] = "ok" if row["error"] <= LIMIT else "failed"
    if row["check"] == "ok":
        # Graphs show the time of the GPU: a host that hands kernels over one by one may be slower.
        graphs = [replayed(run) for run in (found.ours, found.theirs)]
        row["graphs"] = None not in graphs  # of both, or the ratio would be of two kinds
        runs = [run for run in graphs if run] if row["graphs"] else [found.ours, found.theirs]
        each = [seconds_of(run, 3) for run in runs]
        turns = max(3, min(TURNS, int(LONG / max(each))))
        repeats = [max(1, min(50, int(SHORTEST / one))) for one in each]
        pairs = list(zip(runs, repeats, strict=True))
        times = [[seconds_of(*pair) for pair in pairs] for _ in range(turns)]
        ours, theirs = (statistics.median(some) for some in zip(*times, strict=True))
        row |= {"seconds": ours, "torch_seconds": theirs, "ratio": ours / theirs}
        row |= {"predicted_seconds": found.predicted, "host_seconds": host_seconds_of(found.ours)}
        row |= {"goal_seconds": found.seconds, "floors": floors(found)}
        row["torch_tflops"] = None if found.flops is None else found.flops / theirs / 1e12
    return row


def floors(found: Figure) -> dict[str, float]:
    """The least seconds that this GPU allows, by what limits it, where that is known."""
    if not found.bytes or not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_properties(found.args[0].device)
    cycles = getattr(gpu, "clock_rate", 0) * 1e3 * gpu.multi_processor_count
    # Memory moves numbers at both ends of a cycle.
    per_second = getattr(gpu, "memory_clock_rate", 0) * 2e3 * getattr(gpu, "memory_bus_width", 0)
    limits = {
        "bytes": (found.bytes, per_second / 8),
        "minima and maxima": (found.extremes, cycles * EXTREMES),
    }
    return {what: many / rate for what, (many, rate) in limits.items() if many and rate}


def say(row: Row) -> str:
    name = f"{row['op']} {row['dtype']} {row['what']}, {row['backend']}"
    if row["check"] != "ok":
        return f"{name}: FAILED, error {row['error']}"
    time, ratio = f"{row['seconds'] * 1e3:.3f} ms", f"{row['ratio']:.3g}x of torch"
    if row["goal_seconds"] is not None:
        time += f" (goal {row['goal_seconds'] * 1e3:g} ms)"
    if row["predicted_seconds"] is not None and torch.cuda.is_available():
        time += f" (predicted {row['predicted_seconds'] * 1e3:.3f} ms)"
    if row["goal"] is not None:
        ratio += f" (goal {row['goal']:.3g}x)"
    flops = "" if row["torch_tflops"] is None else f" at {row['torch_tflops']:.0f} TFLOP/s"
    least = "".join(f", {what} {t * 1e3:.3f} ms" for what, t in row["floors"].items())
    return f"{name}: {time}, {ratio}{flops}{least and ', floor of' + least[1:]}"


def main(argv: Sequence[str]) -> int:
    parser = options.measuring("headline", __doc__, device="cuda", kept=True)
    parser.add_argument("--first", type=int, metavar="N", help="only so many figures")
    given = parser.parse_args(argv)
    out = given.out or results.file_for("headline", given.device, "jsonl")
    failures = 0
    with torch.no_grad():
        figures = islice(headlines(given.device, given.quick), given.first)
        for row in results.written(map(measure, figures), out, given.device):
            failures += row["check"] != "ok"
            print(say(row), flush=True)
    return 1 if failures else 0
