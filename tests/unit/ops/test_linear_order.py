"""linear_order against F.linear and autograd, one example at a time, and scalar Python."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.backends import on_each_cpu_backend
from support.materialised import gradients
from support.plain_rules import ROUNDING, assert_aggregated
from support.settings import workspace
from support.strategies import dtypes, nonfinite, numbers, orders, spoiled
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.family import order
from pycoherence.ops.family.rules import RULES


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(dtypes)
    b, t, i, o = (draw(st.integers(0, most)) for most in (20, 6, 20, 9))
    x, g = (draw(spoiled(draw(numbers((b, t, size), dtype)))) for size in (i, o))
    return x, g, *draw(orders(b))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, rule, k, drop = call
    wide = x.double()
    rows = gradients(lambda w, b: F.linear(wide[b : b + 1], w), (g.shape[2], x.shape[2]), g)

    def run() -> Tensor:
        return pc.ops.linear_order(x, g, rule, k, nonfinite=nonfinite(drop))

    assert_aggregated("linear_order", run, rows, rule, k, drop, ROUNDING[x.dtype])


@on_each_cpu_backend("linear_order")
@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("rule", ["winsorized_mean", "trimmed_mean", "phocas", "meamed"])
def test_one_outlier_disturbs_no_other_example(rule: str, t: int, backend: str) -> None:
    """As if it were any other extreme value."""
    x, g = torch.randn(9, t, 17), torch.randn(9, t, 6)
    found = []
    for huge in (1e15, 1e30):
        g[3] = huge
        x[3] = x[3].abs()
        found.append(pc.ops.linear_order(x, g, rule, 2))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@on_each_cpu_backend("linear_order")
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_stays_where_it_belongs(rule: str, t: int, backend: str) -> None:
    x, g = torch.randn(7, t, 19), torch.randn(7, t, 5)
    x[2, -1, 18], g[4, 0, 3] = float("nan"), float("inf")
    touched = torch.zeros(5, 19, dtype=torch.bool)
    touched[:, 18], touched[3] = True, True
    out = pc.ops.linear_order(x, g, rule, RULES[rule].fewest)
    dropped = pc.ops.linear_order(x, g, rule, RULES[rule].fewest, nonfinite="drop")
    assert torch.equal(out.isnan(), touched)
    assert dropped.isfinite().all()
    torch.testing.assert_close(dropped[~touched], out[~touched])


def test_the_reference_keeps_to_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some output features at a time, or one of them if no more fit."""
    sizes = []

    def watch(values: Tensor, *rule: object) -> Tensor:
        sizes.append(values.numel())
        return values[0]

    monkeypatch.setattr(order, "aggregate", watch)
    x, g = torch.randn(9, 2, 10), torch.randn(9, 2, 25)
    for size, most in ((10_000, 270), (1, 90)):
        sizes.clear()
        with workspace(size), pc.backend("reference"):
            pc.ops.linear_order(x, g, "median")
        assert sum(sizes) == 9 * 10 * 25
        assert max(sizes) == most
