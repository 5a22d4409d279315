"""Headline figures of kernels that multiply, beside cuBLAS and cuDNN, and what a figure is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu import predicted

Run = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """Something to time.

    Attributes:
        op: Its name.
        what: The shape, for people.
        args: Of the op.
        ours: Gives what is checked.
        theirs: What torch does on the same numbers.
        truth: What `ours` should give, in float64.
        flops: Of what torch does, if it multiplies matrices.
        goal: The ratio to reach, if there is one.
        seconds: To reach on an H200, if there is a goal.
        bytes: That a kernel has to read and write.
        extremes: Minima and maxima that a kernel has to take.
        predicted: Seconds on an H200; see `bench/gpu/predicted.py`.
    """

    op: str
    what: str
    args: tuple[Any, ...]
    ours: Run
    theirs: Run
    truth: Callable[[], tuple[Tensor, ...]]
    flops: float | None = None
    goal: float | None = None
    seconds: float | None = None
    bytes: float = 0
    extremes: float = 0
    predicted: float | None = None


def linear(
    new: Callable[..., Tensor], b: int, t: int, size: int, goal: float | None = None
) -> Figure:
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
    return Figure(
        *("linear_reduce", what, args, ours, lambda: flat_g.T @ flat_x, truth, flops, goal),
        predicted=predicted.linear_reduce(x, g, _BOTH),
    )


_BOTH = frozenset({"sq_norms", "weighted_sum"})


def engine(new: Callable[..., Tensor], b: int, t: int, size: int, goal: float) -> Figure:
    """The same from the tile engine alone, whatever the plan would choose."""
    from pycoherence.triton_kernels.engine.factors import Factors
    from pycoherence.triton_kernels.engine.outputs import one_pass

    found = linear(new, b, t, size, goal)
    factors = Factors.of_linear(*found.args[:2])

    def ours() -> tuple[Tensor, ...]:
        out = one_pass(factors, _BOTH)
        return out["sq_norms"], out["weighted_sum"]

    return replace(found, what=f"tile engine, {found.what}", ours=ours)


def norms(new: Callable[..., Tensor], b: int, t: int, size: int) -> Figure:
    """Norms alone against the weight gradient, which has as many numbers to read."""
    found = linear(new, b, t, size)
    args = (*found.args[:-1], 1)
    return Figure(
        found.op,
        f"norms alone, B={b} T={t} {size}x{size}",
        args,
        lambda: torch.ops.pycoherence.linear_reduce(*args)[:1],
        found.theirs,
        lambda: found.truth()[:1],
        found.flops,
        predicted=predicted.linear_reduce(*args[:2], frozenset({"sq_norms"})),
    )


def gram(new: Callable[..., Tensor], b: int, size: int, goal: float | None = None) -> Figure:
    """The Gram matrix of rank-one gradients against the two Grams of their factors."""
    x, g = new(b, 1, size), new(b, 1, size)
    args = (x, g, None, None)
    rows = x[:, 0], g[:, 0]

    def truth() -> tuple[Tensor, ...]:
        one, other = (row.double() @ row.double().T for row in rows)
        return (one * other,)

    return Figure(
        "linear_gram",
        f"B={b} T=1 {size}x{size}",
        args,
        lambda: (torch.ops.pycoherence.linear_gram(*args),),
        lambda: [row @ row.T for row in rows],
        truth,
        4.0 * b**2 * size,
        goal,
        predicted=predicted.of_products(4.0 * b**2 * size, x.dtype),
    )


def conv(new: Callable[..., Tensor], b: int, channels: int, size: int, groups: int = 1) -> Figure:
    """Norms and weight gradient of a 3x3 convolution against the weight gradient."""
    x, g = new(b, channels, size, size), new(b, channels, size, size)
    weight = new(channels, channels // groups, 3, 3)
    window = ([3, 3], [1, 1], [1, 1], [1, 1], groups)
    args = (x, g, *window, None, None, 5)
    kind = f"{channels} channels" + (f" in {groups} groups" if groups > 1 else "")
    options = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False])

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

    return Figure(
        "conv_reduce",
        f"norms + weight gradient, B={b} {kind} 3x3 {size}x{size}",
        args,
        ours,
        lambda: torch.ops.aten.convolution_backward(g, x, weight, *options),
        truth,
        2.0 * b * (size * channels) ** 2 * 9 / groups,
        predicted=predicted.of_products(2.0 * b * (size * channels) ** 2 * 9 / groups, x.dtype),
    )
