"""NaN and Inf show up in the example's statistics and in the coordinates it touches; only there."""

import pytest
import torch
from support.backends import assert_close, assert_reduced_close, on_each_place, one_kind
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


pytestmark = [pytest.mark.parametrize("bad", BAD.values(), ids=BAD)]


def linear(bad: float, t: int, where: str) -> tuple[Tensor, Tensor]:
    """Example 1 of 3 has one bad number, in the last column, next to what a kernel pads."""
    x, g = torch.randn(3, t, 33), torch.randn(3, t, 5)
    (x if where == "x" else g)[1, t // 2, -1] = bad
    return x, g


@on_each_place("linear_reduce")
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("t", [1, 4, 300])
def test_linear_keeps_it_where_it_belongs(t: int, where: str, backend: str, bad: float) -> None:
    x, g = linear(bad, t, where)
    out = pc.ops.linear_reduce(x, g, direction=torch.ones(5, 33), want=Reduced._fields)
    for per_example in (out.sq_norms, out.dots):
        assert per_example.isfinite().tolist() == [True, False, True]
    for parameter in (out.weighted_sum, out.second_moment):
        touched = torch.zeros(5, 33, dtype=torch.bool)
        touched[(slice(None), -1) if where == "x" else (-1, slice(None))] = True
        assert torch.equal(parameter.isfinite(), ~touched)


@on_each_place("linear_reduce")
@pytest.mark.parametrize("want", [("sq_norms",), Reduced._fields[2:], Reduced._fields])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("t", [1, 4, 300])
def test_linear_agrees_with_the_reference(
    t: int, where: str, want: tuple[str, ...], backend: str, bad: float
) -> None:
    x, g = linear(bad, t, where)
    tail = {"want": want} | ({"direction": torch.randn(5, 33)} if "dots" in want else {})
    found = []
    for name in (backend, "reference"):
        with pc.backend(name):
            found.append(one_kind(pc.ops.linear_reduce(x, g, **tail)))
    assert_reduced_close(found[0], found[1], 1e-5)


@on_each_place("linear_reduce")
@pytest.mark.parametrize("alone", [True, False], ids=["sum-alone", "sum-and-moments"])
def test_an_example_of_no_weight_is_left_out(alone: bool, backend: str, bad: float) -> None:
    x, g = linear(bad, 4, "g")
    coef = torch.tensor([1.0, 0.0, -2.0])
    want = ("weighted_sum",) if alone else ("weighted_sum", "second_moment")
    out = pc.ops.linear_reduce(x, g, coef=coef, want=want)
    expected = torch.einsum("b,bto,bti->oi", coef[[0, 2]], g[[0, 2]], x[[0, 2]])
    assert_close(out.weighted_sum, expected, 1e-5)


@on_each_place("linear_reduce")
def test_signs_count_infinities_and_pass_on_nan(backend: str, bad: float) -> None:
    x, g = torch.ones(2, 1, 3), torch.ones(2, 1, 1)
    x[0, 0, 1] = bad
    signs = pc.ops.linear_reduce(x, g, want=("sign_sum",)).sign_sum[0]
    expected = {"nan": float("nan"), "inf": 2.0, "-inf": 0.0}[str(bad)]
    torch.testing.assert_close(signs, torch.tensor([2.0, expected, 2.0]), equal_nan=True)


@on_each_place("conv_reduce")
def test_conv_keeps_it_where_it_belongs(backend: str, bad: float) -> None:
    x, g = torch.randn(3, 4, 5, 5), torch.randn(3, 2, 5, 5)
    g[1, 0, 2, 2] = bad
    out = pc.ops.conv_reduce(
        x, g, (3, 3), padding=1, groups=2, want=("sq_norms", "weighted_sum", "second_moment")
    )
    assert out.sq_norms.isfinite().tolist() == [True, False, True]
    for parameter in (out.weighted_sum, out.second_moment):
        assert not parameter[0].isfinite().any()
        assert parameter[1].isfinite().all()


@on_each_place("conv_reduce")
def test_a_corner_is_seen_by_one_tap_only(backend: str, bad: float) -> None:
    """A bad corner pixel is seen by one tap only, at the one position that covers it."""
    x, g = torch.ones(1, 1, 3), torch.ones(1, 1, 1)
    x[0, 0, 2] = bad
    out = pc.ops.conv_reduce(x, g, (3,), want=("weighted_sum",))
    assert out.weighted_sum.isfinite().flatten().tolist() == [True, True, False]


@on_each_place("embedding_reduce")
def test_embedding_keeps_it_where_it_belongs(backend: str, bad: float) -> None:
    ids, g = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.randn(3, 2, 4)
    g[1, 1, 2] = bad
    out = pc.ops.embedding_reduce(ids, g, 5, want=("sq_norms", "weighted_sum", "second_moment"))
    assert out.sq_norms.isfinite().tolist() == [True, False, True]
    for parameter in (out.weighted_sum, out.second_moment):
        assert (~parameter.isfinite()).nonzero().tolist() == [[3, 2]]


@on_each_place("affine_reduce")
def test_affine_keeps_it_where_it_belongs(backend: str, bad: float) -> None:
    g, x = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    x[1, 2, 5] = bad
    out = pc.ops.affine_reduce(g, x, want=("sq_norms", "weighted_sum", "second_moment"))
    assert out.sq_norms.isfinite().tolist() == [True, False, True]
    for parameter in (out.weighted_sum, out.second_moment):
        assert (~parameter.isfinite()).nonzero().tolist() == [[5]]
