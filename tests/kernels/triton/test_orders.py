"""linear_order and conv_order by the tile engine, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_close, in_float64
from support.settings import workspace

import pycoherence as pc
from pycoherence.ops.family.reduce import randn
from pycoherence.ops.family.rules import RULES

LINEAR = (5, 3, 4, 3)

BAD = [float("nan"), float("inf"), -float("inf")]


def linear(b: int, t: int, i: int, o: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = randn(b, t, i, device="cpu", dtype=dtype)
    return x, randn(b, t, o, device="cpu", dtype=dtype, seed=2)


def conv(groups: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = randn(5, 4, 4, 3, device="cpu", dtype=dtype)
    g = randn(5, 6, 4, 2, device="cpu", dtype=dtype, seed=2)
    return x, g, [3, 2], [1, 1], [1, 0], [1, 1], groups


def check(op: str, *args: Any) -> None:
    with pc.backend("triton"):
        found = getattr(torch.ops.pycoherence, op)(*args)
    expected = pc.ops.specs[op].reference(*in_float64(args))
    assert_close(found, expected, TOLERANCE[args[0].dtype], str(args[-3:]))


def number(rule: str) -> float:
    return 0.2 if rule == "sign_agreement" else float(min(2, RULES[rule].most(5)))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, drop: bool) -> None:
    check("linear_order", *linear(*LINEAR), rule, number(rule), drop)
    check("conv_order", *conv(2), rule, number(rule), drop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["median", "median_of_means", "sign_agreement"])
def test_dtypes(rule: str, dtype: torch.dtype) -> None:
    check("linear_order", *linear(*LINEAR, dtype), rule, number(rule), False)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 7])
def test_medians_of_means_of_any_groups(k: int) -> None:
    check("linear_order", *linear(7, 2, 5, 3), "median_of_means", float(k), False)


@pytest.mark.parametrize("k", [0.0, 0.2, 0.6, 1.0])
def test_thresholds_of_sign_agreement(k: float) -> None:
    """The shares of five signs are among the thresholds: both sides divide alike."""
    x, g = linear(5, 1, 6, 5)
    args = (x, g, "sign_agreement", k, False)
    with pc.backend("triton"):
        found = (
            pc.ops.specs["linear_order"].reference(*args),
            torch.ops.pycoherence.linear_order(*args),
        )
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_makes_a_coordinate_nan_or_is_dropped(rule: str, bad: float) -> None:
    x, g = linear(*LINEAR)
    g[1, 0, 2] = x[3, 1, -1] = bad
    for drop in (False, True):
        check("linear_order", x, g, rule, number(rule), drop)


@pytest.mark.parametrize("rule", ["median_of_means", "sign_agreement"])
def test_infinities_that_cancel_and_sums_that_leave_the_range(rule: str) -> None:
    x = torch.ones(4, 1, 3)
    g = torch.tensor([2e38, 2e38, -1e38, 3e38]).view(4, 1, 1).repeat(1, 1, 3)
    g[0, 0, 1], g[1, 0, 1] = float("inf"), -float("inf")
    check("linear_order", x, g, rule, 2.0 if rule == "median_of_means" else 0.5, False)


@pytest.mark.parametrize("size", [1, 1500])
@pytest.mark.parametrize("rule", ["median_of_means", "trimmed_mean", "sign_agreement"])
def test_a_small_workspace(rule: str, size: int) -> None:
    """Rows of the weight one by one, or some that do not divide the channels of a group."""
    with workspace(size):
        check("linear_order", *linear(*LINEAR), rule, number(rule), False)
        for groups in (1, 2):
            check("conv_order", *conv(groups), rule, number(rule), False)


def test_empty_batches() -> None:
    for shape in ((0, 2, 3, 4), (5, 0, 3, 4), (5, 2, 0, 4), (5, 2, 3, 0)):
        for rule in ("median", "median_of_means", "sign_agreement"):
            k = 0.0 if rule == "median" else 1.0
            check("linear_order", *linear(*shape), rule, k, False)
