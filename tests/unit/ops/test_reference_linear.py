"""linear_reduce against F.linear and autograd, one example at a time; exactly, on integers."""

import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.materialised import assert_exactly, gradients
from support.strategies import dtypes, numbers, tails

import pycoherence as pc


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(dtypes)
    b, t, i, o = (draw(st.integers(0, most)) for most in (5, 9, 35, 20))
    x, g = draw(numbers((b, t, i), dtype)), draw(numbers((b, t, o), dtype))
    return x, g, draw(tails(b, (o, i), dtype))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, tail = call
    wide = x.double()
    rows = gradients(lambda w, b: F.linear(wide[b : b + 1], w), (g.shape[2], x.shape[2]), g)
    assert_exactly("linear_reduce", lambda: pc.ops.linear_reduce(x, g, **tail), rows, tail)
