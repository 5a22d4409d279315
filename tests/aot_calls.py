"""Calls of ops on the device "meta", as models make them: what `aot.py` compiles.

They are chosen so that every row of a kernel's table of tiles is hit. All calls of an op are
compiled for bfloat16 on one GPU, the first of them for all GPUs and all dtypes; one is enough for
float16.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops._reduce import mask

KINDS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Of numbers; float32 where torch allows TensorFloat-32, and where not."""

THOROUGH = ("bfloat16", 90)

NORMS, SUM, BOTH = ("sq_norms",), ("weighted_sum",), ("sq_norms", "weighted_sum")
MOMENTS, ALL = (*BOTH, "second_moment"), Reduced._fields

Call = tuple[str, tuple[Any, ...]]


def calls(op: str, kind: str, capability: int) -> Iterator[Call]:
    """Labels and arguments of the calls to compile."""
    source = _Source(KINDS[kind])
    first, more = _CALLS[op]
    if kind == "float16":
        yield next(first(source))
        return
    yield from first(source)
    if (kind, capability) == THOROUGH:
        yield from more(source)


class _Source:
    """Tensors without data."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def statistic(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.accumulate, device="meta")

    def tail(
        self, want: tuple[str, ...], batch: int, *shape: int, coef: bool = False
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """What all `*_reduce` ops share: `coef`, `direction`, `want`."""
        direction = self.statistic(*shape) if "dots" in want else None
        return self.statistic(batch) if coef else None, direction, mask(want)


def _linear_reduce(
    new: _Source, shape: tuple[int, int, int, int], want: tuple[str, ...], coef: bool = False
) -> Call:
    b, t, i, o = shape
    tail = new.tail(want, b, o, i, coef=coef)
    return f"B,T,I,O={shape} {'+'.join(want)}", (new(b, t, i), new(b, t, o), *tail)


def _linear_reduce_first(new: _Source) -> Iterator[Call]:
    yield _linear_reduce(new, (32, 512, 768, 768), BOTH)
    yield _linear_reduce(new, (32, 512, 768, 768), NORMS)
    yield _linear_reduce(new, (2048, 1, 4096, 4096), NORMS)
    yield _linear_reduce(new, (32, 512, 4096, 4096), MOMENTS)


def _linear_reduce_more(new: _Source) -> Iterator[Call]:
    yield _linear_reduce(new, (32, 512, 4096, 4096), ALL)
    yield _linear_reduce(new, (8, 1024, 768, 50257), BOTH)
    yield _linear_reduce(new, (8, 16, 768, 768), NORMS)
    yield _linear_reduce(new, (8, 4096, 768, 768), BOTH)
    yield _linear_reduce(new, (256, 1, 784, 1024), SUM, coef=True)
    yield _linear_reduce(new, (256, 1, 1024, 10), MOMENTS)
    yield _linear_reduce(new, (4, 3, 5, 7), ALL)


CONV2D = ((3, 3), (1, 1), (1, 1), (1, 1))


def _conv(
    new: _Source,
    shape: tuple[int, ...],
    outputs: int,
    window: tuple[tuple[int, ...], ...] = CONV2D,
    groups: int = 1,
    last: bool = False,
) -> tuple[str, Tensor, Tensor, tuple[Any, ...]]:
    """A label and the factors; `window` is kernel, stride, padding, dilation."""
    batch, _, *size = shape
    out = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, *window, strict=True)
    ]
    x, g = new(*shape), new(batch, outputs, *out)
    if last:
        x, g = (y.movedim(1, -1).contiguous().movedim(-1, 1) for y in (x, g))
    kernel, stride, padding, dilation = map(list, window)
    label = f"x={shape} O={outputs} kernel={kernel} stride={stride} groups={groups} last={last}"
    return label, x, g, (kernel, stride, padding, dilation, groups)


def _conv_reduce(new: _Source, want: tuple[str, ...], *args: Any, **options: Any) -> Call:
    label, x, g, window = _conv(new, *args, **options)
    parameter = (g.shape[1], x.shape[1] // window[-1], *window[0])
    tail = new.tail(want, len(x), *parameter)
    return f"{label} {'+'.join(want)}", (x, g, *window, *tail)


def _conv_reduce_first(new: _Source) -> Iterator[Call]:
    yield _conv_reduce(new, BOTH, (128, 64, 56, 56), 64)
    yield _conv_reduce(new, BOTH, (128, 256, 14, 14), 256, last=True)
    yield _conv_reduce(new, NORMS, (128, 512, 7, 7), 512)


def _conv_reduce_more(new: _Source) -> Iterator[Call]:
    stride2 = ((3, 3), (2, 2), (1, 1), (1, 1))
    yield _conv_reduce(new, BOTH, (128, 3, 224, 224), 64, ((7, 7), (2, 2), (3, 3), (1, 1)))
    yield _conv_reduce(new, BOTH, (128, 64, 56, 56), 128, stride2)
    yield _conv_reduce(new, BOTH, (128, 64, 56, 56), 128, ((1, 1), (2, 2), (0, 0), (1, 1)))
    yield _conv_reduce(new, ALL, (32, 128, 28, 28), 128, CONV2D, 4)
    yield _conv_reduce(new, BOTH, (32, 128, 28, 28), 128, CONV2D, 128)
    yield _conv_reduce(new, BOTH, (16, 64, 1000), 96, ((5,), (1,), (2,), (1,)))
    yield _conv_reduce(new, BOTH, (4, 16, 16, 32, 32), 32, ((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3))


def _affine_reduce(
    new: _Source, kind: str, shape: tuple[int, int, int], want: tuple[str, ...]
) -> Call:
    b, t, c = shape
    g = new(b, t, c)
    statistics = {
        "bias": (None, None, None),
        "layer": (new(b, t, c), new.statistic(b, t, 1), new.statistic(b, t, 1)),
        "rms": (new(b, t, c), None, new.statistic(b, t, 1)),
        "group": (new(b, c, t).mT, new.statistic(b, 1, c), new.statistic(b, 1, c)),
    }
    g = new(b, c, t).mT if kind == "group" else g
    return f"{kind} B,T,C={shape} {'+'.join(want)}", (
        *(g, *statistics[kind]),
        *new.tail(want, b, c),
    )


def _affine_reduce_first(new: _Source) -> Iterator[Call]:
    yield _affine_reduce(new, "layer", (8, 1024, 768), BOTH)
    yield _affine_reduce(new, "bias", (8, 1024, 768), BOTH)


def _affine_reduce_more(new: _Source) -> Iterator[Call]:
    yield _affine_reduce(new, "group", (128, 3136, 64), BOTH)
    yield _affine_reduce(new, "rms", (8, 1024, 768), ALL)
    yield _affine_reduce(new, "bias", (8, 1024, 50257), BOTH)
    yield _affine_reduce(new, "bias", (256, 1, 10), BOTH)
    yield _affine_reduce(new, "bias", (2048, 1, 4096), ALL)


def _linear_gram(new: _Source, shape: tuple[int, int, int, int], others: int | None = None) -> Call:
    b, t, i, o = shape
    other = (None, None) if others is None else (new(others, t, i), new(others, t, o))
    return f"B,T,I,O={shape} others={others}", (new(b, t, i), new(b, t, o), *other)


def _linear_gram_first(new: _Source) -> Iterator[Call]:
    yield _linear_gram(new, (2048, 1, 4096, 4096))
    yield _linear_gram(new, (32, 512, 768, 768))
    yield _linear_gram(new, (8, 64, 4096, 4096))


def _linear_gram_more(new: _Source) -> Iterator[Call]:
    yield _linear_gram(new, (256, 1, 784, 1024))
    yield _linear_gram(new, (256, 1, 1024, 10), 100)
    yield _linear_gram(new, (128, 512, 4096, 4096), 64)
    yield _linear_gram(new, (3, 5, 7, 9))


def _conv_gram(new: _Source, others: int | None, *args: Any, **options: Any) -> Call:
    label, x, g, window = _conv(new, *args, **options)
    other = (None, None)
    if others is not None:
        other = tuple(y.new_empty((others, *y.shape[1:])) for y in (x, g))
    return f"{label} others={others}", (x, g, *other, *window)


def _conv_gram_first(new: _Source) -> Iterator[Call]:
    yield _conv_gram(new, None, (128, 64, 56, 56), 64)
    yield _conv_gram(new, None, (128, 512, 7, 7), 512)


def _conv_gram_more(new: _Source) -> Iterator[Call]:
    yield _conv_gram(new, 16, (32, 128, 28, 28), 128, CONV2D, 4)
    yield _conv_gram(new, None, (16, 64, 1000), 96, ((5,), (1,), (2,), (1,)))


def _linear_order_first(new: _Source) -> Iterator[Call]:
    x, g = new(32, 512, 768), new(32, 512, 768)
    for rule, k in (("median_of_means", 3.0), ("winsorized_mean", 2.0)):
        yield f"32,512,768,768 {rule}", (x, g, rule, k, False)


def _conv_order_first(new: _Source) -> Iterator[Call]:
    label, x, g, window = _conv(new, (32, 64, 56, 56), 64)
    for rule, k in (("median_of_means", 3.0), ("winsorized_mean", 2.0)):
        yield f"{label} {rule}", (x, g, *window, rule, k, False)


def _nothing(new: _Source) -> Iterator[Call]:
    return iter(())


_CALLS = {
    "affine_reduce": (_affine_reduce_first, _affine_reduce_more),
    "conv_gram": (_conv_gram_first, _conv_gram_more),
    "conv_order": (_conv_order_first, _nothing),
    "conv_reduce": (_conv_reduce_first, _conv_reduce_more),
    "linear_gram": (_linear_gram_first, _linear_gram_more),
    "linear_order": (_linear_order_first, _nothing),
    "linear_reduce": (_linear_reduce_first, _linear_reduce_more),
}
