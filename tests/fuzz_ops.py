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
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from support.fuzz_cases import FAMILIES, Array, Draw, Factors, wide
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced, specs
from pycoherence.ops.core.outputs import mask
from pycoherence.ops.core.spec import accumulate_dtype, tensors_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("normal",) * 6 + ("whole", "whole", "sparse", "offset", "large", "small", "decades")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


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
    """Describe what is wrong with an output, whose terms are as large as `size`."""
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
    """Make the calls of a case; returns what was wrong, and how many there were."""
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
