"""What hypothesis may try on the ops.

Numbers are small integers: with those all sums are exact in float32, so results can be compared
exactly, and gradients that vanish really do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.family.rules import RULES
from support.backends import DTYPES

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""By number of spatial dimensions."""

LAYOUTS = ("contiguous", "transposed", "sliced", "offset")

dtypes = st.sampled_from(list(DTYPES.values()))
wants = st.lists(st.sampled_from(Reduced._fields), min_size=1, unique=True).map(tuple)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; what lies between them is NaN."""
    if x.dim() == 0 or layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    long = x.new_full((len(x) + 2, *x.shape[1:]), float("nan"))
    long[1:-1] = x
    return long[1:-1]


@st.composite
def numbers(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, top: int = 3) -> Tensor:
    """Integers from -top to top in some layout, perhaps the same for all examples."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randint(-top, top + 1, tuple(shape), generator=generator).to(dtype)
    if shape and draw(st.integers(0, 4)) == 0:
        dim = draw(st.integers(0, len(shape) - 1))
        return x.narrow(dim, 0, min(1, shape[dim])).expand(x.shape)
    return lay_out(x, draw(st.sampled_from(LAYOUTS)))


@st.composite
def tails(draw: st.DrawFn, batch: int, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments that all `*_reduce` functions share."""
    want = draw(wants)
    other = draw(st.sampled_from([dtype, torch.float32, torch.float64]))
    tail: dict[str, Any] = {"want": want}
    if {"weighted_sum", "sum_dots"}.intersection(want) and draw(st.booleans()):
        tail["coef"] = draw(numbers((batch,), other, top=2))
    if "dots" in want:
        tail["direction"] = draw(numbers(shape, other))
    return tail


@st.composite
def convolved(draw: st.DrawFn, most: int, batches: int) -> tuple[Any, ...]:
    """Factors of batches of up to `most` examples each, the kernel, options, the weight's shape."""
    dtype, n, groups = draw(dtypes), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    i, o = draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(n)]

    kernel = each(1, 3 if n < 3 else 2)
    options = {"dilation": each(1, 2), "groups": groups}
    kind = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    options |= {"stride": each(1, 3) if kind != "same" else 1}
    options |= {"padding": each(0, 2) if kind == "numbers" else kind}
    pad = options["padding"] if kind == "numbers" else [10 if kind == "same" else 0] * n
    weight, factors = torch.zeros(o * groups, i, *kernel), []
    for _ in range(batches):
        size = each(1, 6 if n < 3 else 4)
        fits = zip(size, pad, kernel, options["dilation"], strict=True)
        assume(all(s + 2 * p > d * (k - 1) for s, p, k, d in fits))
        x = draw(numbers((draw(st.integers(0, most)), i * groups, *size), dtype))
        out = CONVOLUTIONS[n](torch.zeros(1, *x.shape[1:]), weight, **options)
        factors += [x, draw(numbers((len(x), *out.shape[1:]), dtype))]
    return factors, kernel, options, tuple(weight.shape)


@st.composite
def lookups(draw: st.DrawFn, batches: int = 1, most: int = 5) -> tuple[Any, ...]:
    """Ids and output gradients of batches, how large the table is, and an id of padding."""
    dtype, v, d = draw(dtypes), draw(st.integers(1, 7)), draw(st.integers(0, 6))
    kind, factors = draw(st.sampled_from([torch.int32, torch.int64])), []
    for _ in range(batches):
        b, t = draw(st.integers(0, most)), draw(st.integers(0, 9))
        ids = draw(numbers((b, t), torch.float64, top=20)).remainder(v).to(kind)
        if draw(st.booleans()):
            ids = ids.mT.contiguous().mT
        factors += [ids, draw(numbers((b, t, d), dtype))]
    return factors, v, draw(st.none() | st.integers(0, v - 1))


@st.composite
def spoiled(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers, or some of them replaced by what is not finite."""
    if not x.numel() or draw(st.integers(0, 2)):
        return x
    x = x.clone()
    for _ in range(draw(st.integers(1, 4))):
        at = tuple(draw(st.integers(0, size - 1)) for size in x.shape)
        x[at] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    return x


@st.composite
def orders(draw: st.DrawFn, batch: int) -> tuple[str, float, bool]:
    """A rule, a number that it can have in a batch of this size, and whether to drop."""
    name = draw(st.sampled_from(list(RULES)))
    rule = RULES[name]
    if rule.whole:
        most = max(rule.fewest, rule.most(batch))
        k = draw(st.integers(rule.fewest, most) | st.sampled_from([rule.fewest, most]))
    else:
        k = draw(st.integers(0, max(1, batch))) / max(1, batch)
    return name, k, draw(st.booleans())


def nonfinite(drop: bool) -> str:
    return "drop" if drop else "nan"
