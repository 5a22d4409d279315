"""Measures the kernels that matter most beside what the GPU does anyway: cuBLAS and cuDNN.

    python bench/headline.py [--device cpu] [--quick] [--out FILE]

Each is the time of an op as a multiple of that of one call in torch on the same numbers: norms with
the weight gradient against the weight gradient alone, the Gram matrix of rank-one gradients against
the Grams of their factors. What is wrong is not timed. Results are JSON lines.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from clock import seconds_of
from torch import Tensor

import pycoherence as pc
from pycoherence.ops._backends import choice

Run = Callable[[], Any]

LIMIT = 1e-5
"""Allowed error over the largest value."""

TURNS = 15
"""Of both, one after the other; figures are medians."""


@dataclass(frozen=True)
class Headline:
    """Something to time.

    Attributes:
        op: Its name.
        what: The shape, for people.
        args: Of the op.
        ours: Gives what is checked.
        theirs: What torch does on the same numbers.
        truth: What `ours` should give, in float64.
        flops: Of what torch does.
        goal: The ratio to reach, if there is one.
    """

    op: str
    what: str
    args: tuple[Any, ...]
    ours: Run
    theirs: Run
    truth: Callable[[], tuple[Tensor, ...]]
    flops: float
    goal: float | None = None


def linear(
    new: Callable[..., Tensor], b: int, t: int, size: int, goal: float | None = None
) -> Headline:
    """Norms and weight gradient of a square layer against the weight gradient."""
    x, g = new(b, t, size), new(b, t, size)
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    args = (x, g, None, None, 5)

    def ours() -> tuple[Tensor, ...]:
        out = torch.ops.pycoherence.linear_reduce(*args)
        return out[0], out[2]

    def truth() -> tuple[Tensor, ...]:
        norms, total = [], torch.zeros(size, size, dtype=torch.float64, device=x.device)
        for one_x, one_g in zip(x, g, strict=True):  # all gradients at once may not fit
            row = one_g.double().mT @ one_x.double()
            norms.append(row.square().sum())
            total += row
        return torch.stack(norms), total

    what = f"norms + weight gradient, B={b} T={t} {size}x{size}"
    flops = 2.0 * b * t * size**2
    return Headline(
        "linear_reduce", what, args, ours, lambda: flat_g.T @ flat_x, truth, flops, goal
    )


def norms(new: Callable[..., Tensor], b: int, t: int, size: int) -> Headline:
    """Norms alone against the weight gradient, which has as many numbers to read."""
    found = linear(new, b, t, size)
    args = (*found.args[:-1], 1)
    return Headline(
        found.op,
        f"norms alone, B={b} T={t} {size}x{size}",
        args,
        lambda: torch.ops.pycoherence.linear_reduce(*args)[:1],
        found.theirs,
        lambda: found.truth()[:1],
        found.flops,
    )


def gram(new: Callable[..., Tensor], b: int, size: int, goal: float | None = None) -> Headline:
    """The Gram matrix of rank-one gradients against the two Grams of their factors."""
    x, g = new(b, 1, size), new(b, 1, size)
    args = (x, g, None, None)
    rows = x[:, 0], g[:, 0]

    def truth() -> tuple[Tensor, ...]:
        one, other = (row.double() @ row.double().T for row in rows)
        return (one * other,)

    return Headline(
        "linear_gram",
        f"B={b} T=1 {size}x{size}",
        args,
        lambda: (torch.ops.pycoherence.linear_gram(*args),),
        lambda: [row @ row.T for row in rows],
        truth,
        4.0 * b**2 * size,
        goal,
    )


def conv(new: Callable[..., Tensor], b: int, channels: int, size: int) -> Headline:
    """Norms and weight gradient of a 3x3 convolution against the weight gradient."""
    x, g = new(b, channels, size, size), new(b, channels, size, size)
    weight = new(channels, channels, 3, 3)
    window = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    args = (x, g, *window, None, None, 5)
    options = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])

    def ours() -> tuple[Tensor, ...]:
        out = torch.ops.pycoherence.conv_reduce(*args)
        return out[0], out[2]

    def truth() -> tuple[Tensor, ...]:
        rows = [
            torch.ops.aten.convolution_backward(
                one_g[None].double(), one_x[None].double(), weight.double(), *options
            )[1]
            for one_x, one_g in zip(x, g, strict=True)
        ]
        return torch.stack([row.square().sum() for row in rows]), sum(rows[1:], rows[0])

    return Headline(
        "conv_reduce",
        f"norms + weight gradient, B={b} {channels} channels 3x3 {size}x{size}",
        args,
        ours,
        lambda: torch.ops.aten.convolution_backward(g, x, weight, *options),
        truth,
        2.0 * b * (size * channels) ** 2 * 9,
    )


def headlines(device: str, quick: bool) -> Iterator[Headline]:
    """The most valuable first."""

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def new32(*shape: int) -> Tensor:
        return new(*shape, dtype=torch.float32)

    if quick:
        yield linear(new, 3, 5, 16, 1 / 0.75)
        yield norms(new, 3, 1, 16)
        yield gram(new, 5, 16, 2)
        yield conv(new32, 2, 4, 6)
        return
    yield linear(new, 32, 512, 4096, 1 / 0.75)
    yield linear(new, 32, 512, 768, 1 / 0.6)
    yield gram(new, 2048, 4096, 2)
    for batch, positions, size in (
        (32, 512, 4096),
        (32, 512, 768),
        (64, 128, 4096),
        (2048, 1, 4096),
    ):
        yield norms(new, batch, positions, size)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield conv(new, 128, channels, size)
    yield linear(new32, 32, 512, 768)
    yield gram(new32, 2048, 1024)


def measure(found: Headline) -> dict[str, Any]:
    """A row of results."""
    row: dict[str, Any] = {"op": found.op, "what": found.what, "goal": found.goal}
    dtype = found.args[0].dtype
    row["dtype"] = str(dtype).removeprefix("torch.")
    row["backend"] = choice(pc.ops.specs[found.op], found.args[0].device.type, found.args)
    try:
        pairs = list(zip(found.ours(), found.truth(), strict=True))
    except RuntimeError as error:  # out of memory, say: the next rows may still be had
        return row | {"error": str(error).splitlines()[0], "check": "failed"}
    row["error"] = max(((o - t).abs().max() / t.abs().max()).item() for o, t in pairs)
    row["check"] = "ok" if row["error"] <= LIMIT else "failed"
    if row["check"] == "ok":
        for run in (found.ours, found.theirs):
            seconds_of(run, 3)
        turns = [(seconds_of(found.ours), seconds_of(found.theirs)) for _ in range(TURNS)]
        ours, theirs = (statistics.median(times) for times in zip(*turns, strict=True))
        row |= {"seconds": ours, "torch_seconds": theirs, "ratio": ours / theirs}
        row["torch_tflops"] = found.flops / theirs / 1e12
    return row


def say(row: dict[str, Any]) -> str:
    name = f"{row['op']} {row['dtype']} {row['what']}, {row['backend']}"
    if row["check"] != "ok":
        return f"{name}: FAILED, error {row['error']}"
    times = f"{row['seconds'] * 1e3:.3f} ms, {row['ratio']:.2f}x of torch"
    goal = "" if row["goal"] is None else f", goal {row['goal']:.2f}x"
    return f"{name}: {times} ({row['torch_tflops']:.0f} TFLOP/s){goal}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try it")
    parser.add_argument("--out", type=Path, help="default: a file for this machine in results/")
    options = parser.parse_args()
    out = options.out or environment.RESULTS / f"headline-{environment.slug(options.device)}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    setting = environment.setting(options.device)
    failures = 0
    with out.open("w", buffering=1) as file, torch.no_grad():
        for found in headlines(options.device, options.quick):
            row = measure(found)
            failures += row["check"] != "ok"
            print(say(row), flush=True)
            file.write(json.dumps(row | setting) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
