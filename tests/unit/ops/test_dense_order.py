"""The rules of the `*_order` ops against scalar Python, one coordinate at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import on_each_cpu_backend
from support.plain_rules import ROUNDING, assert_aggregated
from support.strategies import dtypes, nonfinite, numbers, orders, spoiled
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.family.rules import RULES

on_each_backend = on_each_cpu_backend("dense_order")
WHOLE = [name for name, rule in RULES.items() if rule.whole]
BATCHES = (
    st.integers(0, 9) | st.integers(10, 70) | st.sampled_from([127, 128, 129, 256, 1025, 1500])
)


@st.composite
def calls(draw: st.DrawFn):
    dtype, batch = draw(dtypes), draw(BATCHES)
    shape = draw(st.lists(st.integers(0, 5), max_size=3 if batch < 100 else 1))
    rows = draw(spoiled(draw(numbers((batch, *shape), dtype))))
    return rows, *draw(orders(batch))


@given(calls())
def test_equals_sorted_lists_of_fractions(call) -> None:
    """Whole numbers: most are tied with others, and many are zero."""
    rows, rule, k, drop = call

    def run() -> Tensor:
        return pc.ops.dense_order(rows, rule, k, nonfinite=nonfinite(drop))

    assert_aggregated("dense_order", run, rows, rule, k, drop, ROUNDING[rows.dtype])


@given(calls(), st.integers(0, 2**16))
def test_equals_sorted_lists_of_any_numbers(call, seed: int) -> None:
    """Of very different sizes."""
    like, rule, k, drop = call
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, *like.shape, generator=generator, dtype=torch.float64)
    rows = normal[0] * (2 * normal[1]).exp()

    def run() -> Tensor:
        return pc.ops.dense_order(rows, rule, k, nonfinite=nonfinite(drop))

    assert_aggregated("dense_order", run, rows, rule, k, drop, 1e-12)


@pytest.mark.parametrize("rule", ["winsorized_mean", "trimmed_mean", "phocas", "meamed"])
@pytest.mark.parametrize("batch", [3, 8, 37, 300])
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("huge", [1e30, -1e30])
def test_one_outlier_disturbs_no_other_value(rule: str, batch: int, k: int, huge: float) -> None:
    k = min(k, (batch - 1) // 2)
    rows = torch.randn(batch, 5)
    rows[batch // 2] = huge

    def run() -> Tensor:
        return pc.ops.dense_order(rows, rule, k)

    assert_aggregated("dense_order", run, rows, rule, k, False, 1e-6)


@on_each_backend
def test_medians_are_those_of_torch(backend: str) -> None:
    for batch in (1, 2, 7, 64, 1031):
        rows = torch.randn(batch, 9)
        lower = pc.ops.dense_order(rows, "lower_median")
        middle = pc.ops.dense_order(rows, "median")
        assert torch.equal(lower, rows.median(0).values)
        torch.testing.assert_close(middle, rows.quantile(0.5, 0, interpolation="midpoint"))


@on_each_backend
@pytest.mark.parametrize("rule", RULES)
def test_mildest_k_gives_the_mean(rule: str, backend: str) -> None:
    if "median" in rule and rule != "median_of_means":
        pytest.skip("a median has no k")
    rows = torch.randn(41, 6)
    out = pc.ops.dense_order(rows, rule, RULES[rule].fewest)
    torch.testing.assert_close(out, rows.mean(0))


@on_each_backend
def test_the_lower_of_two_equally_near_comes_first(backend: str) -> None:
    """0.1 and 0.7 are as far from their middle, though not once that is rounded."""
    for dtype in (torch.float32, torch.float64):
        rows = torch.tensor([[0.7, 3.0, -0.3], [0.1, -5.0, 0.7]], dtype=dtype)
        assert torch.equal(pc.ops.dense_order(rows, "meamed", 1), rows.min(0).values)


@on_each_backend
def test_middles_of_the_largest_numbers_are_finite(backend: str) -> None:
    rows = torch.full((2, 3), torch.finfo(torch.float32).max)
    assert torch.equal(pc.ops.dense_order(rows, "median"), rows[0])


@on_each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_stays_in_its_coordinate(rule: str, bad: float, backend: str) -> None:
    """Or leaves its example out there: the rule of the others, not of others and a guess."""
    rows, k = torch.randn(12, 40), max(1, RULES[rule].fewest) if RULES[rule].most(12) else 0
    rows[4, 7] = bad
    others = torch.cat([rows[:4], rows[5:]])
    out = pc.ops.dense_order(rows, rule, k)
    dropped = pc.ops.dense_order(rows, rule, k, nonfinite="drop")
    alone = pc.ops.dense_order(others, rule, k)
    assert out.isnan().nonzero().tolist() == [[7]]
    torch.testing.assert_close(dropped[7], alone[7])
    keep = torch.arange(40) != 7
    torch.testing.assert_close(dropped[keep], out[keep])


@on_each_backend
@pytest.mark.parametrize("rule", RULES)
def test_examples_none_of_which_is_finite_give_nan(rule: str, backend: str) -> None:
    rows = torch.full((4, 3), float("nan"))
    out = pc.ops.dense_order(rows, rule, RULES[rule].fewest, nonfinite="drop")
    assert out.isnan().all()


@on_each_backend
@pytest.mark.parametrize("rule", RULES)
def test_no_examples_give_zeros(rule: str, backend: str) -> None:
    assert pc.ops.dense_order(torch.zeros(0, 2, 3), rule, 5).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("rule", WHOLE)
def test_a_whole_number_may_come_as_a_float(rule: str) -> None:
    rows = torch.randn(9, 4)
    k = RULES[rule].most(9)
    assert torch.equal(pc.ops.dense_order(rows, rule, k), pc.ops.dense_order(rows, rule, float(k)))
