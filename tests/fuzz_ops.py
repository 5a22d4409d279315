"""Random calls of every op on the CPU, on all backends, against loops in float64.

    python tests/fuzz_ops.py [--calls 10000] [--seed 0] [--show 5]
    python tests/fuzz_ops.py --only 4711       # one call, in words

A call is drawn from a seed: shapes around the sizes of blocks, empty and single ones, strides of
all kinds, dtypes, numbers that tie, that are large, small or not finite, the size of the workspace.
Its gradients are made by loops over positions and taps, its outputs one example or coordinate at a
time. Native kernels must give the same bits again and with two threads, and no argument may change.
"""

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced, specs
from pycoherence.ops._reduce import mask
from pycoherence.ops._spec import accumulate_dtype, tensors_of

Array = NDArray[np.float64]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("normal",) * 6 + ("whole", "whole", "sparse", "offset", "large", "small", "decades")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NEAR = (2, 4, 8, 16, 32, 64, 128, 256, 512)


class Draw:
    """What a seed gives."""

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


class Case(NamedTuple):
    """A call, and what its outputs have to be."""

    op: str
    args: tuple[Any, ...]
    judge: Callable[[Any], list[str]]
    workspace: int


def make(seed: int) -> Case:
    """The call of a seed."""
    d = Draw(seed)
    family, what = d.pick(*_OPS)
    dtype, kind = d.pick(*DTYPES), d.pick(*KINDS)
    if dtype == torch.float16 and kind in ("large", "decades"):
        kind = "normal"
    factors = FAMILIES[family](d, dtype, kind, d.chance(0.1), d.size(20))
    args, judge = {"reduce": _reduce, "gram": _gram, "order": _order}[what](d, dtype, factors)
    return Case(f"{family}_{what}", args, judge, d.pick(64 << 20, 64 << 20, 40000, 1000, 1))


_OPS = [
    (op.rpartition("_")[0], op.rpartition("_")[2])
    for op in specs
    if op.rpartition("_")[0] in FAMILIES
]

Judged = tuple[tuple[Any, ...], Callable[[Any], list[str]]]


def _flat(x: Array) -> Array:
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _zero(terms: Array, present: NDArray[np.bool_] | None) -> Array:
    return terms if present is None else np.where(present, terms, 0.0)


def _reduce(d: Draw, dtype: torch.dtype, factors: Factors) -> Judged:
    names = [name for name in Reduced._fields if d.chance(0.4)] or ["sq_norms"]
    summed = {"weighted_sum", "sum_dots"} & set(names)
    shape, acc = factors.gradients()[0].shape[1:], accumulate_dtype(dtype)
    coef = direction = None
    if summed and d.chance(0.5):
        coef = d.tensor((factors.batch,), acc, "sparse", False)
    if "dots" in names:
        direction = d.tensor(shape, acc, "normal", False)

    def judge(outputs: Any) -> list[str]:
        G, M = map(_flat, factors.gradients())
        present = None if factors.present is None else _flat(factors.present())
        c = np.ones(len(G)) if coef is None else wide(coef)
        total = np.where(c[:, None] == 0, 0.0, c[:, None] * G).sum(0)
        large = (abs(c)[:, None] * M).sum(0)
        v = None if direction is None else wide(direction).reshape(-1)
        truth = {
            "sq_norms": lambda: ((G * G).sum(1), (M * M).sum(1)),
            "dots": lambda: (_zero(G * v, present).sum(1), (M * abs(v)).sum(1)),
            "weighted_sum": lambda: (total, large),
            "second_moment": lambda: ((G * G).sum(0), (M * M).sum(0)),
            "sign_sum": lambda: (np.where(np.isnan(G), G, np.sign(G)).sum(0), None),
            "sum_dots": lambda: (_zero(G * total, present).sum(1), (M * large).sum(1)),
            "gram": lambda: _gram_of(G, M, present, G, M, present),
        }
        # The sign of a sum that is as small as its rounding may differ.
        unsure = (abs(G) <= 1e-5 * M) & (M > 0)
        problems: list[str] = []
        for name, out in zip(Reduced._fields, outputs, strict=True):
            if (out is not None) != (name in names):
                problems.append(f"{name} is {out}")
            elif out is not None:
                expected, size = truth[name]()
                if name == "sign_sum" and unsure.any():
                    continue
                problems += compare(name, out.reshape(expected.shape), expected, size, acc)
        return problems

    return (*factors.head, coef, direction, mask(names)), judge


def _gram_of(G: Array, M: Array, present: Any, H: Array, N: Array, also: Any) -> Any:
    found = np.zeros((len(G), len(H)))
    for b, c in product(range(len(G)), range(len(H))):
        both = None if present is None else present[b] & also[c]
        found[b, c] = _zero(G[b] * H[c], both).sum()
    return found, M @ N.T


def _gram(d: Draw, dtype: torch.dtype, factors: Factors) -> Judged:
    if len(factors.head) == 1:
        (rows,) = factors.head
        one, options = (rows.reshape(len(rows), math.prod(rows.shape[1:])),), ()
    else:
        one, options = factors.head[:2], factors.head[2:]
    if factors.present is not None:
        options = options[1:]  # a Gram does not ask how large the table is

    def judge(out: Any) -> list[str]:
        G, M = map(_flat, factors.gradients())
        present = None if factors.present is None else _flat(factors.present())
        expected, size = _gram_of(G, M, present, G, M, present)
        problems = compare("gram", out, expected, size, accumulate_dtype(dtype))
        return problems + ([] if _same(out, out.mT) else ["gram: not symmetric"])

    return (*one, *(None for _ in one), *options), judge


def _order(d: Draw, dtype: torch.dtype, factors: Factors) -> Judged:
    rule, batch = d.pick("winsorized_mean", "trimmed_mean", "median", "lower_median"), factors.batch
    drop, acc = d.chance(0.5), accumulate_dtype(dtype)
    k = float(d.random.randint(0, max(0, (batch - 1) // 2))) if rule.endswith("mean") else 0.0

    def judge(out: Any) -> list[str]:
        G, M = map(_flat, factors.gradients())
        expected = np.array([_ordered(column, rule, int(k), drop) for column in G.T])
        size = M.max(0, initial=0.0)
        return compare(rule, out.reshape(-1), expected, size, acc) if batch else []

    return (*factors.head, rule, k, drop), judge


def _ordered(column: Array, rule: str, k: int, drop: bool) -> float:
    finite = np.isfinite(column)
    values = np.sort(column[finite])
    n = len(values)
    needed = 2 * k + 1 if rule.endswith("mean") else 1
    if (not drop and not finite.all()) or n < needed:
        return math.nan
    if rule == "winsorized_mean":
        return float(values.clip(values[k], values[n - 1 - k]).mean())
    if rule == "trimmed_mean":
        return float(values[k : n - k].mean())
    if rule == "lower_median":
        return float(values[(n - 1) // 2])
    return float((values[(n - 1) // 2] + values[n // 2]) / 2)


def compare(
    name: str, found: Tensor, expected: Array, size: Array | None, acc: torch.dtype
) -> list[str]:
    """What is wrong with an output, whose terms are as large as `size`."""
    if found.dtype != acc or tuple(found.shape) != expected.shape:
        return [f"{name}: {found.dtype} {tuple(found.shape)}, expected {acc} {expected.shape}"]
    ours = wide(found)
    # Half precision rounds nothing that is added up, and Inf may become NaN on the way.
    if not np.array_equal(np.isfinite(ours), np.isfinite(expected)):
        return [f"{name}: not finite in other places"]
    fine = np.isfinite(expected)
    if not fine.any():
        return []
    scale = max(abs(expected[fine]).max(), 0.0 if size is None else size[fine].max(initial=0.0))
    error = abs(ours - expected)[fine].max()
    return [f"{name}: off by {error:.3g} of {scale:.3g}"] if error > TOLERANCE[acc] * scale else []


def _same(one: Any, two: Any) -> bool:
    pairs = zip(tensors_of([one]), tensors_of([two]), strict=True)
    return all(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in pairs)


def run(case: Case) -> tuple[list[str], int]:
    """What was wrong with a call, and how many were made."""
    before = [x.clone() for x in tensors_of(case.args)]
    op = getattr(torch.ops.pycoherence, case.op)
    pc.set_workspace(case.workspace)
    problems, calls = list[str](), 0
    try:
        for backend in ("native", "reference"):
            with pc.backend(backend):
                found = op(*case.args)
                problems += [f"{backend}: {problem}" for problem in case.judge(found)]
                calls += 1
                if backend == "native":
                    torch.set_num_threads(2)
                    again = op(*case.args)
                    torch.set_num_threads(1)
                    calls += 1
                    if not _same(found, again):
                        problems.append("native: other bits with two threads")
    finally:
        torch.set_num_threads(1)
        pc.set_workspace(None)
    for x, then in zip(tensors_of(case.args), before, strict=True):
        if not _same(x, then):
            problems.append("an argument was written to")
    return problems, calls


def described(case: Case) -> str:
    """A call in words."""
    args = [
        f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}/{x.stride()}"
        if isinstance(x, Tensor)
        else repr(x)
        for x in case.args
    ]
    return f"{case.op}({', '.join(args)}) workspace={case.workspace}"


def fuzz(calls: int, seed: int, show: int = 5) -> int:
    """Run so many calls from a seed on; returns how many cases were wrong."""
    done, wrong, counts = 0, 0, Counter[str]()
    with torch.no_grad(), np.errstate(all="ignore"):
        while done < calls:
            case = make(seed)
            problems, n = run(case)
            done += n
            counts[case.op] += n
            if problems:
                wrong += 1
                if wrong <= show:
                    print(f"seed {seed}: {described(case)}", *problems, sep="\n  ")
            seed += 1
    print(f"{done} calls, {wrong} wrong; {dict(sorted(counts.items()))}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--only", type=int, metavar="SEED", help="one call, in words")
    options = parser.parse_args()
    if options.only is None:
        return 1 if fuzz(options.calls, options.seed, options.show) else 0
    with torch.no_grad(), np.errstate(all="ignore"):
        case = make(options.only)
        problems, _ = run(case)
    print(described(case), *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
