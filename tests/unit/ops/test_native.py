"""Every native kernel: subsets of outputs, large and uneven shapes, threads, long sums."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from support.backends import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_reduced_close,
    backends_of,
    describe,
    each_float,
    in_float64,
)
from support.settings import threads, workspace
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced
from pycoherence.ops.core.spec import tensors_of
from pycoherence.ops.family.conv import positions_out

pytestmark = pytest.mark.slow

OPS = [op for op in pc.ops.specs if op.endswith("_reduce") and "native" in backends_of(op)]

Head = tuple[Any, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def conv_head(b: int, i: int, o: int, size: list[int], *window: list[int], groups: int) -> Head:
    """Arguments of conv_reduce before the tail; window: kernel, stride, padding, dilation."""
    return randn(b, i, *size), randn(b, o, *positions_out(size, *window)), *window, groups


# Shape of the parameter, and the head of the arguments.
LARGE: dict[str, list[Callable[[], tuple[tuple[int, ...], Head]]]] = {
    "linear_reduce": [
        lambda: ((70, 65), (randn(5, 300, 65), randn(5, 300, 70))),
        lambda: ((51, 130), (randn(70, 1, 130), randn(70, 1, 51))),
        lambda: ((129, 260), (randn(1200, 1, 260), randn(1200, 1, 129))),  # several blocks
    ],
    "conv_reduce": [
        lambda: (
            (37, 19, 3, 3),
            conv_head(3, 19, 37, [17, 15], [3, 3], [1, 1], [1, 1], [1, 1], groups=1),
        ),
        lambda: (
            (33, 11, 5),
            conv_head(3, 33, 33, [301], [5], [2], [3], [2], groups=3),
        ),
        lambda: (
            (66, 1, 2, 3, 2),
            conv_head(2, 33, 66, [5, 7, 6], [2, 3, 2], [1, 2, 1], [1, 0, 1], [1, 1, 2], groups=33),
        ),
        lambda: (
            (65, 40, 1, 1),
            conv_head(3, 40, 65, [9, 7], [1, 1], [1, 1], [0, 0], [1, 1], groups=1),
        ),
    ],
    "embedding_reduce": [
        lambda: ((501, 65), (torch.randint(501, (9, 310)), randn(9, 310, 65), 501, 7)),
        lambda: ((3, 33), (torch.randint(3, (70, 50)), randn(70, 50, 33), 3, -1)),
        lambda: ((10007, 17), (torch.randint(10007, (33, 3)), randn(33, 3, 17), 10007, -1)),
    ],
    "affine_reduce": [
        lambda: ((131,), (randn(9, 301, 131), None, None, None)),
        lambda: ((70,), (randn(33, 17, 70), randn(33, 17, 70), randn(33, 17, 1), randn(33, 17, 1))),
        lambda: ((515,), (randn(70, 1, 515), randn(70, 1, 515), None, randn(70, 1, 1))),
        lambda: ((1100,), (randn(3, 300, 1200)[..., 100:], None, None, None)),
        lambda: ((21,), (randn(3, 300, 21), randn(3, 300, 21), randn(1, 1, 21), randn(3, 300, 1))),
        lambda: (  # positions next to each other
            (70,),
            (randn(5, 70, 301).mT, randn(5, 70, 301).mT, randn(5, 1, 70), randn(5, 301, 1)),
        ),
    ],
}

CASES = [(op, i) for op in OPS for i in range(len(LARGE[op]))]


def arguments(op: str, index: int, dtype: torch.dtype, want: int = 127) -> Head:
    torch.manual_seed(index)
    shape, head = LARGE[op][index]()
    batch, wide = len(head[0]), torch.float64 if dtype == torch.float64 else torch.float32
    tail = (
        randn(batch).to(wide) if want & 36 else None,
        randn(*shape).to(wide) if want & 2 else None,
        want,
    )
    return (*each_float(lambda x: x.to(dtype), head), *tail)


def run(op: str, args: Head) -> tuple[Any, ...]:
    with pc.backend("native"):
        return getattr(torch.ops.pycoherence, op)(*args)


def test_every_native_reduction_has_large_shapes_here() -> None:
    assert set(OPS) <= set(LARGE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("op", "index"), CASES)
def test_large_and_uneven_shapes(op: str, index: int, dtype: torch.dtype) -> None:
    args = arguments(op, index, dtype, want=15)
    tolerance = 1e-11 if dtype == torch.float64 else TOLERANCE[dtype]
    expected = pc.ops.specs[op].reference(*in_float64(args))
    assert_reduced_close(run(op, args), expected, tolerance, describe(args))


@pytest.mark.parametrize(("op", "index"), CASES)
def test_whole_numbers_are_exact(op: str, index: int) -> None:
    """So signs are too, and what cancels is zero."""
    args = each_float(lambda x: x.clamp(-1, 1).round(), arguments(op, index, torch.float32))
    expected = pc.ops.specs[op].reference(*in_float64(args))
    for name, ours, truth in zip(Reduced._fields, run(op, args), expected, strict=True):
        if name in ("weighted_sum", "sign_sum"):
            assert torch.equal(ours.double(), truth), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mask", range(1, 128))
def test_every_subset_of_outputs(mask: int, op: str) -> None:
    """Alone or together, with coefficients or without, on the first samples."""
    spec = pc.ops.specs[op]
    full = [args for args in spec.samples("cpu", torch.float32) if args[-1] == 127]
    for *head, coef, direction, _ in islice(full, 3):
        direction = direction if mask & 2 else None
        for weights in (None, coef) if mask & 36 else (None,):
            args = (*head, weights, direction, mask)
            expected = spec.reference(*in_float64(args))
            for name, ours, truth in zip(Reduced._fields, run(op, args), expected, strict=True):
                wanted = bool(mask >> Reduced._fields.index(name) & 1)
                assert (ours is not None) == (truth is not None) == wanted, name
            assert_reduced_close(run(op, args), expected, 1e-5, f"{mask:07b} {describe(args)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("want", [1, 4, 5, 64, 127])
@pytest.mark.parametrize(("op", "index"), CASES)
def test_threads_change_nothing(op: str, index: int, want: int, dtype: torch.dtype) -> None:
    results = []
    for n in (1, 2, 3, 2):
        with threads(n):
            results.append(run(op, arguments(op, index, dtype, want)))
    for other in results[1:]:
        pairs = zip(tensors_of(results[0]), tensors_of(other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", OPS)
def test_one_example_at_a_time_is_the_same(op: str) -> None:
    """Up to rounding: the size of the batch takes part in how the work is divided."""
    args = arguments(op, 0, torch.float32, want=3)
    whole, batch = run(op, args), len(args[0])
    for b in range(batch):
        alone = [
            x[b : b + 1] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x
            for x in args[:-2]
        ]
        sq_norm, dot, *_ = run(op, (*alone, *args[-2:]))
        scale = whole[0][b].sqrt() * args[-2].norm()
        assert_close(sq_norm[0], whole[0][b], 1e-6)
        assert (dot[0] - whole[1][b]).abs() <= 1e-6 * scale


def test_long_sums_do_not_drift() -> None:
    """All of one sign, where rounding adds up: 200 000 positions, 10 000 of one token."""
    t, heads = 200_000, dict[str, Head]()
    heads["linear_reduce"] = (torch.rand(1, t, 8), torch.rand(1, t, 3))
    heads["affine_reduce"] = (torch.rand(1, t, 8), torch.rand(1, t, 8), None, None)
    heads["embedding_reduce"] = (torch.randint(20, (1, t)), torch.rand(1, t, 8), 20, -1)
    window = ([3], [1], [0], [1])
    heads["conv_reduce"] = (torch.rand(1, 3, t + 2), torch.rand(1, 4, t), *window, 1)
    for op in OPS:
        args = (*heads[op], None, None, 13)
        expected = pc.ops.specs[op].reference(*in_float64(args))
        assert_reduced_close(run(op, args), expected, 1e-5, op)


@pytest.mark.skipif("linear_reduce" not in OPS, reason="the native kernels are not built")
def test_positions_that_cancel_keep_their_digits() -> None:
    """Inputs that all positions share meet output gradients that add up to nearly nothing."""
    x = randn(5, 1, 300).expand(5, 12, 300) + 1e-4 * randn(5, 12, 300)
    g = randn(5, 12, 400)
    g = g - g.mean(1, keepdim=True)
    for want in (1, 64):
        args = (x, g, None, None, want)
        expected = pc.ops.specs["linear_reduce"].reference(*in_float64(args))
        assert_reduced_close(run("linear_reduce", args), expected, 1e-5, "linear_reduce")


@pytest.mark.skipif("linear_reduce" not in OPS, reason="the native kernels are not built")
@pytest.mark.parametrize("size", [1e-200, 1e-310, 1e200])
def test_norms_of_one_position_have_the_range_of_their_dtype(size: float) -> None:
    x = torch.full((2, 1, 3), size, dtype=torch.float64)
    g = torch.full((2, 1, 5), 1e-100 / size, dtype=torch.float64)
    sq_norms, *_ = run("linear_reduce", (x, g, None, None, 1))
    expected = 15 * (x[0, 0, 0] * g[0, 0, 0]) ** 2
    torch.testing.assert_close(sq_norms, expected.expand(2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.skipif("linear_reduce" not in OPS, reason="the native kernels are not built")
def test_dots_with_the_sum_of_more_examples_than_have_room(positions: int) -> None:
    args = (randn(700, positions, 9), randn(700, positions, 5), torch.rand(700), None, 32)
    expected = pc.ops.specs["linear_reduce"].reference(*in_float64(args))
    with workspace(1000):
        found = run("linear_reduce", args)
    assert_reduced_close(found, expected, 1e-5, "linear_reduce")


def test_numbers_that_are_not_finite_show_and_leave_others_alone() -> None:
    """Norms by products of Grams: with one example that has NaN, and one that has Inf."""
    x, g = torch.randn(5, 30, 512), torch.randn(5, 30, 512)
    with pc.backend("native"):
        before = pc.ops.linear_reduce(x, g).sq_norms
        g[1, 3, 7], x[3, 2, 1] = torch.nan, torch.inf
        found = pc.ops.linear_reduce(x, g).sq_norms
    assert found[1].isnan()
    assert not found[3].isfinite()
    assert torch.equal(found[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("want", [("sum_dots",), ("sum_dots", "gram")], ids="-".join)
def test_an_example_of_no_weight_still_shows_that_it_is_not_finite(want: tuple[str, ...]) -> None:
    x, g = torch.randn(3, 1, 3), torch.randn(3, 1, 4)
    g[1, 0, 0], g[2, 0, 1] = torch.nan, torch.inf
    with pc.backend("native"):
        found = pc.ops.linear_reduce(x, g, coef=torch.zeros(3), want=want).sum_dots
    assert found[0] == 0
    assert found[1:].isnan().all()
