"""Headline figures of kernels that multiply, beside cuBLAS and cuDNN, and what a figure is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import pycoherence as pc
from bench.gpu import predicted
from bench.ops.cases import in_float64
from pycoherence.ops.family.reduce import Reduced, mask

Run = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """Something to time.

    Attributes:
        op: Its name.
        what: The shape, for people.
        args: Arguments of the op.
        ours: Gives what is checked.
        theirs: The computation in torch on the same numbers.
        truth: The result that `ours` should give, in float64.
        flops: Number of FLOPs in torch, if it multiplies matrices.
        goal: The ratio to reach, if there is one.
        seconds: Seconds to reach on an H200, if there is a goal.
        bytes: Bytes that a kernel has to read and write.
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


BOTH = ("sq_norms", "weighted_sum")


def reduced(
    op: str, head: tuple[Any, ...], wanted: tuple[str, ...]
) -> tuple[tuple[Any, ...], Run, Run]:
    """Arguments of a `*_reduce` op, `ours` and `truth`."""
    args = (*head, None, None, mask(wanted))
    run, places = getattr(torch.ops.pycoherence, op), [*map(Reduced._fields.index, wanted)]

    def ours() -> tuple[Tensor, ...]:
        out = run(*args)
        return tuple(out[place] for place in places)

    return args, ours, lambda: tuple(in_float64(pc.ops.specs[op], wanted, args).values())


def linear(
    new: Callable[..., Tensor],
    b: int,
    t: int,
    size: int,
    goal: float | None = None,
    wanted: tuple[str, ...] = BOTH,
) -> Figure:
    """Norms, and the weight gradient if it is wanted, of a square layer against the gradient."""
    x, g = new(b, t, size), new(b, t, size)
    flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
    args, ours, truth = reduced("linear_reduce", (x, g), wanted)
    what = "norms + weight gradient" if wanted == BOTH else "norms alone"
    return Figure(
        "linear_reduce",
        f"{what}, B={b} T={t} {size}x{size}",
        args,
        ours,
        lambda: flat_g.T @ flat_x,
        truth,
        2.0 * b * t * size**2,
        goal,
        predicted=predicted.linear_reduce(x, g, frozenset(wanted)),
    )


def engine(new: Callable[..., Tensor], b: int, t: int, size: int, goal: float) -> Figure:
    """The same from the tile engine alone, whatever the plan would choose."""
    from pycoherence.triton_kernels.engine.factors import Factors
    from pycoherence.triton_kernels.engine.outputs import one_pass

    found = linear(new, b, t, size, goal)
    factors = Factors.of_linear(*found.args[:2])

    def ours() -> tuple[Tensor, ...]:
        out = one_pass(factors, frozenset(BOTH))
        return tuple(out[name] for name in BOTH)

    return replace(found, what=f"tile engine, {found.what}", ours=ours)


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
    args, ours, truth = reduced("conv_reduce", (x, g, *window), BOTH)
    kind = f"{channels} channels" + (f" in {groups} groups" if groups > 1 else "")
    options = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [False, True, False])

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
