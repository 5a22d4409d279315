"""The native Grams: large and uneven shapes, one batch and two, threads, small workspaces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import (
    DTYPES,
    TOLERANCE,
    assert_close,
    backends_of,
    describe,
    each_float,
    in_float64,
)
from support.settings import threads, workspace
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.family.conv import positions_out

OPS = [op for op in pc.ops.specs if op.endswith("_gram") and "native" in backends_of(op)]

Args = tuple[Any, ...]
Window = tuple[list[int], list[int], list[int], list[int]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def linear(b1: int, b2: int, t1: int, t2: int, i: int, o: int) -> Args:
    return randn(b1, t1, i), randn(b1, t1, o), randn(b2, t2, i), randn(b2, t2, o)


def conv(
    b1: int, b2: int, i: int, o: int, s1: list[int], s2: list[int], window: Window, groups: int = 1
) -> Args:
    """window: kernel, stride, padding, dilation."""
    factors = []
    for b, s in ((b1, s1), (b2, s2)):
        factors += [randn(b, i, *s), randn(b, o, *positions_out(s, *window))]
    return (*factors, *window, groups)


def embedding(b1: int, b2: int, t1: int, t2: int, v: int, d: int, padding_idx: int = -1) -> Args:
    ids1, ids2 = torch.randint(v, (b1, t1)), torch.randint(v, (b2, t2), dtype=torch.int32)
    return ids1, randn(b1, t1, d), ids2, randn(b2, t2, d), padding_idx


def dense(b1: int, b2: int, p: int) -> Args:
    return randn(b1, p), randn(b2, p)


SQUARE: Window = ([3, 3], [1, 1], [1, 1], [1, 1])
CUBE: Window = ([2, 3, 2], [1, 2, 1], [1, 0, 1], [1, 1, 1])
POINT: Window = ([1, 1], [1, 1], [0, 0], [1, 1])

# Both ways of each op: few positions and many, with large gradients and small ones.
LARGE: dict[str, list[Callable[[], Args]]] = {
    "linear_gram": [
        lambda: linear(5, 9, 300, 170, 65, 70),
        lambda: linear(70, 67, 1, 1, 130, 51),
        lambda: linear(130, 3, 1, 1, 9, 8),
        lambda: linear(9, 7, 2, 301, 100, 90),
        lambda: linear(33, 20, 3, 5, 400, 200),
        lambda: linear(1, 2, 65, 1, 1, 1030),
    ],
    "conv_gram": [
        lambda: conv(3, 5, 19, 37, [17, 15], [9, 31], SQUARE),
        lambda: conv(5, 4, 64, 130, [2, 2], [1, 3], SQUARE),
        lambda: conv(70, 33, 40, 65, [1, 1], [1, 1], POINT),
        lambda: conv(3, 4, 33, 33, [301], [200], ([5], [2], [3], [2]), 3),
        lambda: conv(5, 3, 66, 66, [9, 9], [8, 11], ([7, 7], [2, 1], [3, 3], [1, 1]), 66),
        lambda: conv(
            2, 3, 33, 66, [5, 7, 6], [5, 5, 6], ([2, 3, 2], [1] * 3, [1] * 3, [1] * 3), 33
        ),
    ],
    "embedding_gram": [
        lambda: embedding(9, 13, 310, 170, 501, 65, padding_idx=7),
        lambda: embedding(70, 3, 50, 1, 3, 33),
        lambda: embedding(33, 40, 3, 7, 10007, 17),
    ],
    "dense_gram": [
        lambda: dense(130, 67, 3001),
        lambda: dense(3, 5, 100_003),
        lambda: dense(130, 67, 9),  # as sums of outer products
        lambda: dense(300, 1, 64),
        lambda: (randn(4097, 70).mT, randn(65, 4098)[:, 1:]),
        lambda: (randn(65, 6000)[:, ::2], randn(1, 3000).expand(9, -1)),
    ],
}

CASES = [(op, i, batches) for op in OPS for i in range(len(LARGE[op])) for batches in (1, 2)]


def cut(op: str, args: Args, batches: int) -> Args:
    """The same for one batch with itself."""
    first = 1 if op == "dense_gram" else 2
    return args if batches == 2 else (*args[:first], *[None] * first, *args[2 * first :])


def arguments(op: str, index: int, batches: int, dtype: torch.dtype) -> Args:
    torch.manual_seed(index)
    return each_float(lambda x: x.to(dtype), cut(op, LARGE[op][index](), batches))


def run(op: str, args: Args) -> Tensor:
    with pc.backend("native"):
        return getattr(torch.ops.pycoherence, op)(*args)


def truth(op: str, args: Args) -> Tensor:
    expected = pc.ops.specs[op].reference(*in_float64(args))
    assert isinstance(expected, Tensor)
    return expected


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("op", "index", "batches"), CASES)
def test_large_and_uneven_shapes(op: str, index: int, batches: int, dtype: torch.dtype) -> None:
    args = arguments(op, index, batches, dtype)
    assert_close(run(op, args), truth(op, args), TOLERANCE[dtype], describe(args))


@pytest.mark.parametrize(("op", "index"), [case[:2] for case in CASES if case[2] == 1])
def test_a_batch_with_itself_is_symmetric_and_what_two_of_them_give(op: str, index: int) -> None:
    args = arguments(op, index, 1, torch.float32)
    first = 1 if op == "dense_gram" else 2
    alone, twice = run(op, args), run(op, (*args[:first], *args[:first], *args[2 * first :]))
    assert torch.equal(alone, alone.mT)
    assert_close(alone, twice.double(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "index", "batches"), CASES)
def test_threads_change_nothing(op: str, index: int, batches: int, dtype: torch.dtype) -> None:
    args, results = arguments(op, index, batches, dtype), []
    for n in (1, 2, 3, 2):
        with threads(n):
            results.append(run(op, args))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 5000, 2**17])
@pytest.mark.parametrize(("op", "index", "batches"), CASES)
def test_a_small_workspace_changes_only_rounding(
    op: str, index: int, batches: int, size: int, dtype: torch.dtype
) -> None:
    args = arguments(op, index, batches, dtype)
    expected = run(op, in_float64(args))
    with workspace(size):
        assert_close(run(op, args), expected, TOLERANCE[dtype], describe(args))


@st.composite
def small(draw: st.DrawFn) -> tuple[str, Args]:
    """Whole numbers, which all ways of each op must add up exactly."""
    op, (b1, b2) = draw(st.sampled_from(OPS)), (draw(st.integers(0, 20)) for _ in range(2))
    t1, t2 = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    i, o = draw(st.integers(1, 70)), draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 1, 2, i]))
    options = ([draw(st.integers(1, 4))], [draw(st.integers(1, 2))], [2], [1])
    made = {
        "linear_gram": lambda: linear(b1, b2, t1, t2, i, o),
        "conv_gram": lambda: conv(
            b1, b2, i // groups * groups, o * groups, [t1], [t2], options, groups
        ),
        "embedding_gram": lambda: embedding(b1, b2, t1, t2, o, i, draw(st.integers(-1, 3))),
        "dense_gram": lambda: dense(b1, b2, i * o),
    }
    args = each_float(lambda x: x.clamp(-2, 2).round(), made[op]())
    return op, cut(op, args, draw(st.integers(1, 2)))


@pytest.mark.skipif(not OPS, reason="the native kernels are not built")
@given(small(), st.sampled_from([1, 3000, 2**26]))
def test_whole_numbers_are_exact(call: tuple[str, Args], size: int) -> None:
    op, args = call
    with workspace(size):
        found = run(op, args)
    assert torch.equal(found.double(), truth(op, args))


def test_long_sums_do_not_drift() -> None:
    """All of one sign, where rounding adds up."""
    t = 200_000
    long: dict[str, Args] = {
        "linear_gram": (torch.rand(2, t, 8), torch.rand(2, t, 3), None, None),
        "conv_gram": (torch.rand(2, 3, t), torch.rand(2, 4, t), None, None, [1], [1], [0], [1], 1),
        "embedding_gram": (torch.randint(20, (2, t)), torch.rand(2, t, 8), None, None, -1),
        "dense_gram": (torch.rand(2, 5 * t), torch.rand(3, 5 * t)),
    }
    for op in OPS:
        assert_close(run(op, long[op]), truth(op, long[op]), 1e-5, op)


@pytest.mark.parametrize(("x", "g"), [(0.3, 0.7), (1e-15, 1e15)], ids=["many", "wide"])
def test_products_of_grams_keep_digits_and_range(x: float, g: float) -> None:
    x1, g1 = torch.full((1, 64, 2048), x), torch.full((1, 64, 2048), g)
    with pc.backend("native"):
        gram = pc.ops.linear_gram(x1, g1)
    expected = (x1.double()[0] @ x1.double()[0].mT * (g1.double()[0] @ g1.double()[0].mT)).sum()
    assert abs(gram.item() / expected.item() - 1) < 1e-5


@pytest.mark.skipif("dense_gram" not in OPS, reason="the native kernels are not built")
def test_long_rows_do_not_drift() -> None:
    """All of one sign, where rounding adds up."""
    rows = torch.rand(3, 3_000_000)
    with workspace(1):  # a single range of columns
        assert_close(run("dense_gram", (rows, None)), rows.double() @ rows.double().T, 1e-6)
