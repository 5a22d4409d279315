"""Factors that `fuzz_ops.py` draws, and the gradients of which they are, by loops in float64."""

import math
import random
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
NEAR = (2, 4, 8, 16, 32, 64, 128, 256, 512)


class Draw:
    """Draws from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *things: Any) -> Any:
        return self.random.choice(things)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int) -> int:
        """Zero and one, small sizes, those around a power of two, any."""
        chance = self.random.random()
        if chance < 0.12:
            return self.pick(0, 1, 1, 1)
        if chance < 0.6:
            return self.random.randint(1, min(most, 12))
        if chance < 0.8:
            return max(1, min(most, self.pick(*NEAR) + self.pick(-1, 0, 1)))
        return self.random.randint(1, most)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str, bad: bool) -> Tensor:
        """Numbers of a kind, some of them not finite, in some layout."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if kind == "whole":
            x = torch.randint(-2, 3, shape, generator=self.generator).double()
        elif kind == "sparse":
            x *= torch.rand(shape, generator=self.generator) < 0.2
        elif kind == "offset":
            x = x * 0.01 + 1
        elif kind in ("large", "small"):
            x *= 100.0 if kind == "large" else 0.01
        elif kind == "decades":
            x *= 10.0 ** (torch.rand(shape, generator=self.generator, dtype=torch.float64) * 4 - 2)
        if bad and x.numel():
            for _ in range(self.random.randint(1, 2)):
                x[tuple(map(self.random.randrange, shape))] = self.pick(math.nan, math.inf)
        return self.laid_out(x.to(dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers, with other strides."""
        how, dims = self.pick("plain", "plain", "permuted", "sliced", "offset", "expanded"), x.dim()
        if not x.numel() or not dims:
            return x
        if how == "permuted":
            order = self.random.sample(range(dims), dims)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(dims)])
        if how == "sliced":
            dim = self.random.randrange(dims)
            wide = torch.stack([torch.full_like(x, 7), x], dim + 1).flatten(dim, dim + 1)
            return wide[(slice(None),) * dim + (slice(1, None, 2),)]
        if how == "offset":
            return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
        if how == "expanded":
            return x.narrow(self.random.randrange(dims), 0, 1).expand(x.shape)
        return x


class Factors(NamedTuple):
    """The factors of some gradients.

    Attributes:
        head: First arguments of the ops of a family.
        batch: Number of examples.
        gradients: Gives the gradients `[B, *shape]`, and how large what they add up is.
        present: `[B, *shape]`, what is no zero of a row that is not looked up; `None` for all.
    """

    head: tuple[Any, ...]
    batch: int
    gradients: Callable[[], tuple[Array, Array]]
    present: Callable[[], NDArray[np.bool_]] | None = None


def wide(x: Tensor) -> Array:
    return x.double().numpy()


def linear(d: Draw, dtype: torch.dtype, kind: str, bad: bool, batch: int) -> Factors:
    t, i, o = d.size(40), d.size(60), d.size(60)
    x, g = (d.tensor((batch, t, n), dtype, kind, bad) for n in (i, o))

    def gradients() -> tuple[Array, Array]:
        found = [np.zeros((batch, o, i)), np.zeros((batch, o, i))]
        for p in range(t):
            for out, of in zip(found, (wide, lambda x: abs(wide(x))), strict=True):
                out += of(g)[:, p, :, None] * of(x)[:, p, None, :]
        return found[0], found[1]

    return Factors((x, g), batch, gradients)


def conv(d: Draw, dtype: torch.dtype, kind: str, bad: bool, batch: int) -> Factors:
    n, groups = d.pick(1, 1, 2, 2, 3), d.pick(1, 1, 2, 3)
    i, o = groups * d.pick(1, 2, 5), groups * d.pick(1, 2, 4)
    window = [[d.random.randint(low, high) for _ in range(n)] for low, high in _WINDOW]
    kernel, stride, padding, dilation = window
    out = [d.random.randint(1, 5) for _ in range(n)]
    size = [
        max(1, (s - 1) * step + e * (k - 1) + 1 - 2 * p)
        for s, k, step, p, e in zip(out, *window, strict=True)
    ]
    out = [
        (s + 2 * p - e * (k - 1) - 1) // step + 1
        for s, k, step, p, e in zip(size, *window, strict=True)
    ]
    x = d.tensor((batch, i, *size), dtype, kind, bad)
    g = d.tensor((batch, o, *out), dtype, kind, bad)

    def gradients() -> tuple[Array, Array]:
        found = [np.zeros((batch, o, i // groups, *kernel)) for _ in range(2)]
        for total, of in zip(found, (wide, lambda x: abs(wide(x))), strict=True):
            seen = np.pad(of(x), [(0, 0), (0, 0), *((p, p) for p in padding)])
            for tap, at in product(product(*map(range, kernel)), product(*map(range, out))):
                places = zip(at, stride, tap, dilation, strict=True)
                here = seen[(slice(None), slice(None), *(a * s + k * e for a, s, k, e in places))]
                here = here.reshape(batch, groups, 1, i // groups)
                there = of(g)[(slice(None), slice(None), *at)].reshape(
                    batch, groups, o // groups, 1
                )
                each = (there * here).reshape(batch, o, i // groups)
                total[(slice(None), slice(None), slice(None), *tap)] += each
        return found[0], found[1]

    return Factors((x, g, *window, groups), batch, gradients)


_WINDOW = ((1, 3), (1, 2), (0, 2), (1, 2))


def embedding(d: Draw, dtype: torch.dtype, kind: str, bad: bool, batch: int) -> Factors:
    t, v, w = d.size(40), max(1, d.size(30)), d.size(30)
    ids = torch.randint(v, (batch, t), generator=d.generator).to(d.pick(torch.int32, torch.int64))
    ids, g = d.laid_out(ids), d.tensor((batch, t, w), dtype, kind, bad)
    padding = d.pick(-1, d.random.randrange(v))
    lookups = [(b, p, int(ids[b, p])) for b in range(batch) for p in range(t)]
    lookups = [each for each in lookups if each[2] != padding]

    def gradients() -> tuple[Array, Array]:
        found = [np.zeros((batch, v, w)) for _ in range(2)]
        for b, p, row in lookups:
            found[0][b, row] += wide(g)[b, p]
            found[1][b, row] += abs(wide(g)[b, p])
        return found[0], found[1]

    def present() -> NDArray[np.bool_]:
        seen = np.zeros((batch, v, w), bool)
        for b, _, row in lookups:
            seen[b, row] = True
        return seen

    return Factors((ids, g, v, padding), batch, gradients, present)


def affine(d: Draw, dtype: torch.dtype, kind: str, bad: bool, batch: int) -> Factors:
    t, c = d.size(60), d.size(100)
    g, x, mean, rstd = d.tensor((batch, t, c), dtype, kind, bad), None, None, None
    if d.chance(0.6):
        x = d.tensor((batch, t, c), dtype, kind, bad)
        shapes = ((batch, t, 1), (1, 1, c), (batch, 1, 1), (batch, t, c))
        mean = d.pick(None, d.tensor(d.pick(*shapes), dtype, "normal", False))
        rstd = d.pick(None, d.tensor(d.pick(*shapes), dtype, "normal", False))

    def gradients() -> tuple[Array, Array]:
        terms, large = wide(g), abs(wide(g))
        if x is not None:
            scale = 1.0 if rstd is None else wide(rstd)
            shift = 0.0 if mean is None else wide(mean)
            terms = terms * ((wide(x) - shift) * scale)
            large = large * ((abs(wide(x)) + abs(shift)) * abs(scale))
        return terms.sum(1), large.sum(1)

    return Factors((g, x, mean, rstd), batch, gradients)


def dense(d: Draw, dtype: torch.dtype, kind: str, bad: bool, batch: int) -> Factors:
    rows = d.tensor((batch, *d.pick((), (d.size(300),), (d.size(9), 7))), dtype, kind, bad)
    return Factors((rows,), batch, lambda: (wide(rows), abs(wide(rows))))


FAMILIES = {
    "linear": linear, "conv": conv, "embedding": embedding, "affine": affine, "dense": dense,
}  # fmt: skip
