"""Every native order statistic: large and uneven shapes, rules in all sizes, threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_close, backends_of, describe, each_float, in_float64
from support.settings import threads, workspace
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.family.conv import positions_out
from pycoherence.ops.family.rules import RULES

OPS = [op for op in pc.ops.specs if op.endswith("_order") and "native" in backends_of(op)]

Args = tuple[Any, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def conv(b: int, i: int, o: int, size: list[int], *window: list[int], groups: int = 1) -> Args:
    """window: kernel, stride, padding, dilation."""
    return randn(b, i, *size), randn(b, o, *positions_out(size, *window)), *window, groups


# Batches below and above what is sorted in registers, and in one piece.
LARGE: dict[str, list[Callable[[], Args]]] = {
    "linear_order": [
        lambda: (randn(130, 1, 35), randn(130, 1, 21)),
        lambda: (randn(16, 1, 130), randn(16, 1, 67)),
        lambda: (randn(1030, 1, 17), randn(1030, 1, 3)),
        lambda: (randn(35, 70, 65), randn(35, 70, 19)),
        lambda: (randn(257, 3, 19), randn(257, 3, 9)),
    ],
    "conv_order": [
        lambda: conv(19, 5, 37, [9, 7], [3, 3], [1, 1], [1, 1], [1, 1]),
        lambda: conv(130, 6, 9, [31], [5], [2], [3], [2], groups=3),
        lambda: conv(33, 7, 14, [5, 7, 6], [2, 3, 2], [1, 2, 1], [1, 0, 1], [1, 1, 2], groups=7),
        lambda: conv(40, 40, 35, [3, 2], [1, 1], [1, 1], [0, 0], [1, 1]),
    ],
    "embedding_order": [
        lambda: (torch.randint(51, (39, 70)), randn(39, 70, 67), 51, 7),
        lambda: (torch.randint(3, (270, 5)), randn(270, 5, 33), 3, -1),
        lambda: (torch.randint(1007, (17, 3)), randn(17, 3, 17), 1007, -1),
    ],
    "dense_order": [
        lambda: (randn(130, 601),),
        lambda: (randn(1500, 13),),
        lambda: (randn(301, 70).mT[::2],),
        lambda: (randn(5, 9, 7, 11),),
    ],
}

CASES = [(op, i) for op in OPS for i in range(len(LARGE[op]))]


def arguments(op: str, index: int, dtype: torch.dtype) -> Args:
    torch.manual_seed(index)
    return each_float(lambda x: x.to(dtype), LARGE[op][index]())


def sizes(rule: str, batch: int) -> list[float]:
    """Numbers of a rule that take different paths: few, some, as many as there can be."""
    kind = RULES[rule]
    if not kind.whole:
        return [0.1, 0.5]
    low, high = kind.fewest, kind.most(batch)
    return sorted({float(min(high, max(low, k))) for k in (2, 6, batch // 3, high)})


def run(op: str, *args: Any) -> Tensor:
    with pc.backend("native"):
        return getattr(torch.ops.pycoherence, op)(*args)


def test_every_native_order_has_large_shapes_here() -> None:
    assert set(OPS) <= set(LARGE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("op", "index"), CASES)
def test_large_and_uneven_shapes(op: str, index: int, rule: str, dtype: torch.dtype) -> None:
    head = arguments(op, index, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else TOLERANCE[dtype]
    for k in sizes(rule, len(head[0])):
        args = (*head, rule, k, False)
        truth = pc.ops.specs[op].reference(*in_float64(args))
        assert_close(run(op, *args), truth, tolerance, describe(args))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("op", "index"), CASES)
def test_what_is_not_finite_is_dropped(op: str, index: int, rule: str) -> None:
    """Here and there, and in all examples of some coordinates."""
    head = arguments(op, index, torch.float32)
    g = next(x for x in head[::-1] if isinstance(x, Tensor))
    for i, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        g[i].select(-1, i % g.shape[-1]).fill_(bad)
    g[..., -1] = float("nan")
    for drop in (True, False):
        args = (*head, rule, sizes(rule, len(g))[0], drop)
        expected = pc.ops.specs[op].reference(*in_float64(args))
        assert_close(run(op, *args), expected, 1e-5, describe(args))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("op", "index"), CASES)
def test_threads_change_nothing(op: str, index: int, rule: str) -> None:
    head, results = arguments(op, index, torch.float32), []
    for n in (1, 2, 3, 2):
        with threads(n):
            results.append(run(op, *head, rule, RULES[rule].fewest, True))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(("op", "index"), CASES)
def test_a_small_workspace_changes_nothing(op: str, index: int) -> None:
    """Up to rounding."""
    args = (*arguments(op, index, torch.float32), "trimmed_mean", 1.0, False)
    whole = run(op, *args)
    with workspace(1000):
        assert_close(run(op, *args), whole, 1e-5, describe(args))


@pytest.mark.parametrize(("batch", "k"), [(1000, 250), (4000, 1900), (531, 116), (9, 3)])
@pytest.mark.parametrize("rule", ["winsorized_mean", "trimmed_mean", "phocas", "meamed"])
def test_sums_of_sorted_values_keep_their_digits(rule: str, batch: int, k: int) -> None:
    """Added up in order, they would go down and up again by hundreds of times their sum."""
    rows = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0))
    spec = pc.ops.specs["dense_order"]
    with pc.backend("native"):
        found = pc.ops.dense_order(rows, rule, k)
    expected = spec.reference(rows.double(), rule, float(k), False)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
