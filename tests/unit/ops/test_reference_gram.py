"""The `*_gram` ops against gradients from autograd, one example at a time; exactly, on integers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.backends import backends_of, on_each_cpu_backend
from support.materialised import assert_gram_exactly, gradients
from support.strategies import CONVOLUTIONS, convolved, dtypes, lookups, numbers
from torch import Tensor

import pycoherence as pc


def second(draw: st.DrawFn, factors: list[Tensor]) -> list[Tensor]:
    """Factors of a second batch, or none for the first batch with itself."""
    return factors if draw(st.booleans()) else []


@st.composite
def linear_calls(draw: st.DrawFn):
    dtype, (i, o) = draw(dtypes), (draw(st.integers(0, most)) for most in (20, 9))
    factors = []
    for _ in range(2):
        b, t = draw(st.integers(0, 5)), draw(st.integers(0, 6))
        factors += [draw(numbers((b, t, size), dtype)) for size in (i, o)]
    return factors[:2], second(draw, factors[2:])


@given(linear_calls())
def test_linear(call) -> None:
    one, two = call

    def rows(x: Tensor, g: Tensor) -> Tensor:
        wide = x.double()
        return gradients(lambda w, b: F.linear(wide[b : b + 1], w), (g.shape[2], x.shape[2]), g)

    assert_gram_exactly(
        "linear_gram", lambda: pc.ops.linear_gram(*one, *two), rows(*one), rows(*(two or one))
    )


@st.composite
def conv_calls(draw: st.DrawFn):
    factors, *rest = draw(convolved(3, 2))
    return factors[:2], second(draw, factors[2:]), *rest


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(conv_calls())
def test_conv(call) -> None:
    one, two, kernel, options, shape = call

    def rows(x: Tensor, g: Tensor) -> Tensor:
        wide, conv = x.double(), CONVOLUTIONS[len(kernel)]
        return gradients(lambda w, b: conv(wide[b : b + 1], w, **options), shape, g)

    assert_gram_exactly(
        "conv_gram",
        lambda: pc.ops.conv_gram(*one, kernel, *two, **options),
        rows(*one),
        rows(*(two or one)),
    )


@st.composite
def embedding_calls(draw: st.DrawFn):
    factors, *rest = draw(lookups(2))
    return factors[:2], second(draw, factors[2:]), *rest


@given(embedding_calls())
def test_embedding(call) -> None:
    one, two, v, padding = call

    def rows(ids: Tensor, g: Tensor) -> Tensor:
        def look_up(weight: Tensor, b: int) -> Tensor:
            return F.embedding(ids[b : b + 1], weight, padding_idx=padding)

        return gradients(look_up, (v, g.shape[2]), g)

    assert_gram_exactly(
        "embedding_gram",
        lambda: pc.ops.embedding_gram(*one, *two, padding_idx=padding),
        rows(*one),
        rows(*(two or one)),
    )


@st.composite
def dense_calls(draw: st.DrawFn):
    dtype, p = draw(dtypes), draw(st.integers(0, 40))
    a, b = (draw(numbers((draw(st.integers(0, 7)), p), dtype)) for _ in range(2))
    return [a], second(draw, [b])


@given(dense_calls())
def test_dense(call) -> None:
    one, two = call
    assert_gram_exactly(
        "dense_gram",
        lambda: pc.ops.dense_gram(*one, *two),
        one[0].double(),
        (two or one)[0].double(),
    )


@on_each_cpu_backend("embedding_gram")
def test_a_large_table_costs_only_the_rows_in_use(backend: str) -> None:
    ids, g = torch.tensor([[5, 10**12], [7, 10**12]]), torch.ones(2, 2, 4)
    assert pc.ops.embedding_gram(ids, g).tolist() == [[8, 4], [4, 8]]


@pytest.mark.parametrize("op", [op for op in pc.ops.specs if op.endswith("_gram")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(op: str, bad: float) -> None:
    args = list(next(iter(pc.ops.specs[op].samples("cpu", torch.float32))))
    factor = 0 if op == "dense_gram" else 1
    args[factor][1].view(-1)[0] = bad
    for backend in backends_of(op):
        with pc.backend(backend):
            out = getattr(torch.ops.pycoherence, op)(*args)
        touched = torch.zeros(out.shape, dtype=torch.bool)
        touched[1], touched[:, 1] = True, True
        assert out[~touched].isfinite().all(), backend
        assert not out[1, 1].isfinite(), backend
