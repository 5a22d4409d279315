"""Calls of ops as models make them, on tensors with or without data."""

from typing import Any

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.core.outputs import mask
from pycoherence.ops.core.spec import accumulate_dtype

NORMS, SUM, BOTH = ("sq_norms",), ("weighted_sum",), ("sq_norms", "weighted_sum")
MOMENTS, ALL = (*BOTH, "second_moment"), Reduced._fields

CONV2D = ((3, 3), (1, 1), (1, 1), (1, 1))
"""A window: kernel, stride, padding, dilation."""

Call = tuple[str, tuple[Any, ...]]
"""For people, and the arguments of the op."""


class Source:
    """New tensors, normal numbers; on the device "meta" none."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, dtype=torch.float32).to(self.device, dtype)

    def statistic(self, *shape: int) -> Tensor:
        return self(*shape, dtype=accumulate_dtype(self.dtype))

    def tail(
        self, want: tuple[str, ...], batch: int, *shape: int, coef: bool = False
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """What all `*_reduce` ops share: `coef`, `direction`, `want`."""
        direction = self.statistic(*shape) if "dots" in want else None
        return self.statistic(batch) if coef else None, direction, mask(want)


def linear_reduce(
    new: Source, want: tuple[str, ...], b: int, t: int, i: int, o: int, coef: bool = False
) -> Call:
    tail = new.tail(want, b, o, i, coef=coef)
    return f"{b},{t},{i},{o} {'+'.join(want)}", (new(b, t, i), new(b, t, o), *tail)


def _conv(
    new: Source,
    shape: tuple[int, ...],
    outputs: int,
    window: tuple[tuple[int, ...], ...] = CONV2D,
    groups: int = 1,
    last: bool = False,
) -> tuple[str, Tensor, Tensor, tuple[Any, ...]]:
    """A label, factors, which have the channels last if asked to, and options."""
    batch, _, *size = shape
    out = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, *window, strict=True)
    ]
    x, g = new(*shape), new(batch, outputs, *out)
    if last:
        x, g = (y.movedim(1, -1).contiguous().movedim(-1, 1) for y in (x, g))
    kernel, stride, padding, dilation = map(list, window)
    label = f"{shape} {outputs} kernel={kernel} stride={stride} groups={groups} last={last}"
    return label, x, g, (kernel, stride, padding, dilation, groups)


def conv_reduce(new: Source, want: tuple[str, ...], *args: Any, **options: Any) -> Call:
    label, x, g, window = _conv(new, *args, **options)
    parameter = (g.shape[1], x.shape[1] // window[-1], *window[0])
    return f"{label} {'+'.join(want)}", (x, g, *window, *new.tail(want, len(x), *parameter))


def affine_reduce(new: Source, want: tuple[str, ...], kind: str, b: int, t: int, c: int) -> Call:
    """`kind` is a bias or the scale of a normalisation: layer, rms, group."""
    if kind == "group":
        g, *rest = new(b, c, t).mT, new(b, c, t).mT, new.statistic(b, 1, c), new.statistic(b, 1, c)
    else:
        g, *rest = new(b, t, c), new(b, t, c), new.statistic(b, t, 1), new.statistic(b, t, 1)
    x, mean, rstd = [None] * 3 if kind == "bias" else rest
    head = (g, x, None if kind == "rms" else mean, rstd)
    return f"{kind} {b},{t},{c} {'+'.join(want)}", (*head, *new.tail(want, b, c))


def linear_gram(new: Source, b: int, t: int, i: int, o: int, others: int | None = None) -> Call:
    other = (None, None) if others is None else (new(others, t, i), new(others, t, o))
    return f"{b},{t},{i},{o} others={others}", (new(b, t, i), new(b, t, o), *other)


def dense_gram(new: Source, b: int, p: int, others: int | None = None) -> Call:
    other = None if others is None else new(others, p)
    return f"{b},{p} others={others}", (new(b, p), other)


def conv_gram(new: Source, others: int | None, *args: Any, **options: Any) -> Call:
    label, x, g, window = _conv(new, *args, **options)
    other = [None] * 2 if others is None else [new(others, *y.shape[1:]) for y in (x, g)]
    return f"{label} others={others}", (x, g, *other, *window)


def linear_order(new: Source, rule: str, k: float, b: int, t: int, i: int, o: int) -> Call:
    return f"{b},{t},{i},{o} {rule}", (new(b, t, i), new(b, t, o), rule, k, False)


def conv_order(new: Source, rule: str, k: float, *args: Any, **options: Any) -> Call:
    label, x, g, window = _conv(new, *args, **options)
    return f"{label} {rule}", (x, g, *window, rule, k, False)
