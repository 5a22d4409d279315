"""Convolutions of one input channel for each output, in Triton's interpreter."""

import math
from typing import Any

import pytest
import torch
from support.backends import assert_close, in_float64
from support.convolved import channels_last, check, check_gram, run
from support.settings import workspace

import pycoherence as pc
from pycoherence.ops import Reduced
from pycoherence.ops.core.outputs import mask
from pycoherence.ops.family.conv import positions_out
from pycoherence.triton_kernels.engine.factors import Factors
from pycoherence.triton_kernels.rows import depthwise
from pycoherence.triton_kernels.rows.depthwise import depthwise_tiles, gradients_in_parts

ALL = mask(Reduced._fields)
DTYPES = [torch.float16, torch.float32, torch.float64]


# B, channels, outputs of each, size, window (kernel, stride, padding, dilation)
PLAIN = (3, 5, 1, [6, 5], ([3, 3], [1, 1], [1, 1], [1, 1]))
CASES = {
    "1d": (3, 3, 1, [11], ([4], [2], [3], [2])),
    "2d": PLAIN,
    "several of each": (2, 3, 4, [5, 4], ([3, 3], [1, 2], [2, 1], [1, 1])),
    "3d": (2, 2, 2, [4, 3, 5], ([2, 3, 2], [1, 2, 1], [1, 0, 1], [1, 1, 2])),
    "4d": (2, 2, 1, [3, 2, 3, 2], ([2, 1, 2, 2], [1, 1, 2, 1], [0, 1, 1, 1], [2, 1, 1, 1])),
    "one": (2, 5, 1, [4, 5], ([1, 1], [1, 1], [0, 0], [1, 1])),
    "one position": (2, 70, 1, [3], ([3], [1], [0], [1])),
    "one channel": (2, 1, 2, [7, 6], ([3, 2], [1, 1], [1, 0], [1, 1])),
    "many taps": (1, 2, 1, [9, 9], ([9, 8], [1, 1], [4, 3], [1, 1])),
    "many channels": (2, 35, 1, [5], ([2], [1], [1], [1])),
    "long": (1, 2, 1, [2300], ([3], [1], [1], [1])),
}

Case = tuple[int, int, int, list[int], tuple[list[int], ...]]


def head_of(case: Case, dtype: torch.dtype = torch.float32, batch: int = 0) -> tuple[Any, ...]:
    """Factors and options."""
    b, channels, each, size, window = case
    x = torch.randn(batch or b, channels, *size).to(dtype)
    g = torch.randn(batch or b, channels * each, *positions_out(size, *window)).to(dtype)
    return x, g, *window, channels


def tail_of(head: tuple[Any, ...], want: int = ALL) -> tuple[Any, ...]:
    acc = torch.float64 if head[0].dtype == torch.float64 else torch.float32
    direction = torch.randn(head[1].shape[1], 1, *head[2], dtype=acc)
    return torch.randn(len(head[0]), dtype=acc), direction, want


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_outputs(case: Case, last: bool) -> None:
    x, g, *options = head_of(case)
    assert Factors.of_conv(x, g, *options).narrow
    if last:
        x, g = channels_last(x), channels_last(g)
    head = (x, g, *options)
    check(*head, *tail_of(head))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    head = head_of(CASES["several of each"], dtype)
    check(*head, *tail_of(head))


@pytest.mark.parametrize("name", ["2d", "several of each"])
def test_any_strides(name: str) -> None:
    x, g, *options = head_of(CASES[name])
    wide = torch.randn(len(x), 3 * x.shape[1], *x.shape[2:])[:, ::3]
    for seen in (wide, x[:1].expand_as(x), x[:, :1].expand_as(x), x.mT.clone().mT):
        check(seen, g, *options, *tail_of((x, g, *options), 7))
    for grads in (channels_last(g), g[:, :1, :1].expand_as(g), g.mT.clone().mT):
        check(x, grads, *options, *tail_of((x, g, *options), 7))


def test_nothing_is_copied() -> None:
    x, g, *options = head_of(PLAIN)
    for factors in ((x, g), (channels_last(x), channels_last(g))):
        seen = Factors.of_conv(*factors, *options)
        assert (seen.x.data_ptr(), seen.g.data_ptr()) == tuple(f.data_ptr() for f in factors)


@pytest.mark.parametrize("size", [1, 600])
@pytest.mark.parametrize("name", ["2d", "several of each"])
def test_a_small_workspace(name: str, size: int) -> None:
    """Channels one by one, some outputs of a channel, or some channels."""
    head, other = head_of(CASES[name]), head_of(CASES[name], batch=4)
    with workspace(size):
        check(*head, *tail_of(head))
        check_gram(head, other)
        for rule, k in (("median", 0.0), ("median_of_means", 2.0), ("sign_agreement", 0.3)):
            args = (*head, rule, k, False)
            expected = pc.ops.specs["conv_order"].reference(*in_float64(args))
            assert_close(run("conv_order", *args), expected, 1e-5, rule)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_positions_are_divided_to_fill_a_gpu(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "_TILE", 64)
    x, g, *options = head_of((1, 2, 1, [9, 7], PLAIN[4]))
    if last:
        x, g = channels_last(x), channels_last(g)
    assert gradients_in_parts(Factors.of_conv(x, g, *options)).shape[1] > 1
    check(x, g, *options, *tail_of((x, g, *options)))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_long_sums_do_not_drift(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one sign, where rounding adds up."""
    monkeypatch.setattr(depthwise, "_TILE", 64)
    window = ([3], [1], [1], [1])
    x, g = torch.rand(1, 2, 2500), torch.rand(1, 2, 2500)
    if last:
        x, g = channels_last(x), channels_last(g)
    check(x, g, *window, 2, None, None, mask(("sq_norms", "weighted_sum")), tolerance=1e-6)


def test_plans_of_large_shapes() -> None:
    """Tiles are full, within the sizes that compile well; parts fit the workspace."""
    for b, c, t, taps in ((128, 64, 3136, 9), (1, 8, 10**6, 9), (2, 1024, 49, 49), (1, 1, 9, 961)):
        for last in (False, True):
            x, g = (torch.empty(b, c, t, device="meta") for _ in range(2))
            if last:
                x, g = channels_last(x), channels_last(g)
            of = depthwise_tiles(Factors.of_conv(x, g, [taps], [1], [taps // 2], [1], c))
            assert math.prod(of[:3]) <= 4096
            assert of.parts == 1 or of.parts * b * c * taps * 4 <= pc.workspace()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "g"])
def test_what_is_not_finite_stays_in_its_example(where: str, bad: float) -> None:
    x, g, *options = head_of(PLAIN)
    (x if where == "x" else g)[1, -1, -1, -1] = bad
    wanted = mask(("sq_norms", "weighted_sum", "second_moment", "sign_sum"))
    check(x, g, *options, None, None, wanted)
    out = Reduced(*run("conv_reduce", x, g, *options, None, x.new_ones(5, 1, 3, 3), ALL))
    assert out.dots.isfinite().tolist() == [True, False, True]
    assert out.gram[::2, ::2].isfinite().all()


def test_empty_batches() -> None:
    for case in ((0, *PLAIN[1:]), (2, 3, 0, *PLAIN[3:])):
        head = head_of(case)
        check(*head, *tail_of(head))
