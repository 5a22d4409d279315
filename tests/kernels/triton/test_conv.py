"""conv_reduce and conv_gram by the tile engine, in Triton's interpreter, on shapes at its edges."""

from itertools import combinations
from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_close, in_float64
from support.convolved import channels_last, check, check_gram, run
from support.settings import workspace

import pycoherence as pc
from pycoherence.ops import Reduced
from pycoherence.ops.conv_reduce import materialise as gradients
from pycoherence.ops.core.outputs import mask
from pycoherence.ops.family.conv import positions_out
from pycoherence.ops.family.reduce import randn
from pycoherence.triton_kernels.engine.factors import Factors, reduce
from pycoherence.triton_kernels.rows.materialised import materialise

SUMS = ("weighted_sum", "second_moment", "sign_sum")
ALL = mask(Reduced._fields)
DTYPES = [torch.float16, torch.float32, torch.float64]


# B, I, O, size, window (kernel, stride, padding, dilation), groups
PLAIN = (2, 3, 5, [6, 5], ([3, 3], [1, 1], [1, 1], [1, 1]), 1)
CASES = {
    "1d": (3, 3, 4, [11], ([4], [2], [3], [2]), 1),
    "2d": PLAIN,
    "3d": (2, 2, 3, [4, 3, 5], ([2, 3, 2], [1, 2, 1], [1, 0, 1], [1, 1, 2]), 1),
    "4d": (2, 2, 2, [3, 2, 3, 2], ([2, 1, 2, 2], [1, 1, 2, 1], [0, 1, 1, 1], [2, 1, 1, 1]), 1),
    "one": (2, 5, 3, [4, 5], ([1, 1], [1, 1], [0, 0], [1, 1]), 1),
    "one, groups": (2, 6, 4, [4, 5], ([1, 1], [1, 1], [0, 0], [1, 1]), 2),
    "one, apart": (2, 5, 3, [4, 5], ([1, 1], [2, 3], [0, 0], [1, 1]), 1),
    "one, padded": (2, 5, 3, [4, 5], ([1, 1], [1, 1], [1, 2], [1, 1]), 1),
    "groups": (2, 6, 4, [5, 6], ([3, 2], [2, 1], [1, 0], [1, 2]), 2),
    "depthwise": (2, 3, 6, [5, 4], ([3, 3], [1, 1], [2, 1], [1, 1]), 3),
    "several tiles": (2, 15, 70, [3, 3], ([3, 3], [1, 1], [1, 1], [1, 1]), 1),
    "tiles of groups": (1, 30, 70, [2], ([5], [1], [2], [1]), 2),
    "long": (2, 2, 3, [2300], ([3], [1], [1], [1]), 1),
}

Case = tuple[int, int, int, list[int], tuple[list[int], ...], int]


def factors_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
    """The head of conv_reduce."""
    b, i, o, size, window, groups = case
    x = randn(b, i, *size, device="cpu", dtype=dtype, seed=seed)
    g = randn(b, o, *positions_out(size, *window), device="cpu", dtype=dtype, seed=seed + 1)
    return x, g, *window, groups


def tail_of(head: tuple[Any, ...], want: int = ALL) -> tuple[Any, ...]:
    """Coefficients and a direction, of those that `want` needs."""
    x, g, kernel, *_, groups = head
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    coef = randn(len(x), device="cpu", dtype=acc, seed=8)
    shape = (g.shape[1], x.shape[1] // groups, *kernel)
    direction = randn(*shape, device="cpu", dtype=acc, seed=9)
    summed = want & mask(("weighted_sum", "sum_dots"))
    return coef if summed else None, direction if want & mask(("dots",)) else None, want


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_outputs(case: Case) -> None:
    head = factors_of(case)
    check(*head, *tail_of(head))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    head = factors_of(PLAIN, dtype)
    check(*head, *tail_of(head))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("t", [1, 15, 16, 17, 63, 64, 65, 130])
def test_positions_around_the_edges_of_blocks(t: int, kernel: int) -> None:
    head = factors_of((2, 3, 2, [t], ([kernel], [1], [kernel // 2], [1]), 1))
    check(*head, *tail_of(head, mask(("sq_norms", "weighted_sum"))))


@pytest.mark.parametrize("channels", [15, 16, 17, 33, 65])
def test_channels_around_the_edges_of_blocks(channels: int) -> None:
    for i, o in ((channels, 3), (3, channels)):
        head = factors_of((1, i, o, [3], ([1], [1], [0], [1]), 1))
        check(*head, *tail_of(head, mask(("sq_norms", "sign_sum"))))


@pytest.mark.parametrize("name", ["2d", "one", "groups"])
def test_any_strides(name: str) -> None:
    x, g, *options = factors_of(CASES[name])
    wide = torch.randn(2, 3 * x.shape[1], *x.shape[2:])[:, ::3]
    want = tail_of((x, g, *options), mask(("sq_norms",)))
    for seen in (x, channels_last(x), wide, x[:1].expand_as(x), x.flip(2).mT.clone().mT):
        check(seen, g, *options, *want)
    for grads in (
        channels_last(g),
        g[:1, :1].expand_as(g),
        g.transpose(0, 1).clone().transpose(0, 1),
    ):
        check(x, grads, *options, *want)


def test_any_two_outputs() -> None:
    head = factors_of((2, 1, 2, [3], ([2], [1], [0], [1]), 1))
    for names in combinations(Reduced._fields, 2):
        check(*head, *tail_of(head, mask(names)), what="+".join(names))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_those_of_tensor_split(parts: int) -> None:
    x, g, *options = factors_of((7, *PLAIN[1:]))
    coef = randn(7, device="cpu", dtype=torch.float32, seed=4)
    found = reduce(Factors.of_conv(x, g, *options), frozenset(SUMS), coef, parts=parts)
    pieces = [each.double().tensor_split(parts) for each in (x, g, coef)]
    for j, (a, b, c) in enumerate(zip(*pieces, strict=True)):
        args = (a, b, *options, c, None, mask(SUMS))
        expected = Reduced(*pc.ops.specs["conv_reduce"].reference(*args))
        for name in SUMS:
            truth = getattr(expected, name).flatten(1)
            assert_close(found[name][j], truth, 0 if name == "sign_sum" else 1e-5, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "g"])
def test_what_is_not_finite_stays_in_its_example(where: str, bad: float) -> None:
    """Next to what lies past the edge of a tile: the reference says what becomes of it."""
    x, g, *options = factors_of((3, *PLAIN[1:]))
    (x if where == "x" else g)[1, -1, -1, -1] = bad
    wanted = mask(("sq_norms", *SUMS))
    check(x, g, *options, None, None, wanted)
    out = Reduced(*run("conv_reduce", x, g, *options, None, x.new_ones(5, 3, 3, 3), ALL))
    assert out.dots.isfinite().tolist() == [True, False, True]
    assert out.gram[::2, ::2].isfinite().all()
    assert not out.gram[1].isfinite().any()


def test_an_example_without_weight_is_left_out() -> None:
    x, g, *options = factors_of((3, *PLAIN[1:]))
    x[1] = torch.nan
    coef = torch.tensor([2.0, 0.0, -1.0])
    check(x, g, *options, coef, None, mask(("weighted_sum", "sum_dots")))


@pytest.mark.parametrize("size", [1, 2000])
@pytest.mark.parametrize("name", ["2d", "groups", "depthwise"])
def test_grams_in_a_small_workspace(name: str, size: int) -> None:
    """Rows of the weight one by one, or some that do not divide the channels of a group."""
    case = CASES[name]
    head, other = factors_of(case), factors_of((3, *case[1:]), seed=5)
    with workspace(size):
        check_gram(head, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    head = factors_of(CASES["groups"], dtype)
    expected = gradients(*in_float64(head)).joined()
    assert_close(materialise(Factors.of_conv(*head)), expected.flatten(2), TOLERANCE[dtype])


def test_empty_batches() -> None:
    for b, i, o in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        head = factors_of((b, i, o, *PLAIN[3:]))
        check(*head, *tail_of(head))
    one, none = factors_of(PLAIN), factors_of((0, *PLAIN[1:]))
    assert run("conv_gram", *one[:2], *none[:2], *one[2:]).shape == (2, 0)
