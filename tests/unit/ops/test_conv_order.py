"""conv_order against F.conv1d, conv2d, conv3d and autograd, and scalar Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import on_each_cpu_backend
from support.materialised import gradients
from support.plain_rules import ROUNDING, assert_aggregated
from support.strategies import CONVOLUTIONS, convolved, nonfinite, orders, spoiled
from torch import Tensor

import pycoherence as pc


@st.composite
def calls(draw: st.DrawFn):
    (x, g), kernel, options, _ = draw(convolved(7, 1))
    x, g = draw(spoiled(x)), draw(spoiled(g))
    return x, g, kernel, options, *draw(orders(len(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, kernel, options, rule, k, drop = call
    shape, conv = (g.shape[1], x.shape[1] // options["groups"], *kernel), CONVOLUTIONS[len(kernel)]
    wide = x.double()
    rows = gradients(lambda w, b: conv(wide[b : b + 1], w, **options), shape, g)

    def run() -> Tensor:
        return pc.ops.conv_order(x, g, kernel, rule, k, nonfinite=nonfinite(drop), **options)

    assert_aggregated("conv_order", run, rows, rule, k, drop, ROUNDING[x.dtype])


@on_each_cpu_backend("conv_order")
def test_depthwise_channels_keep_to_themselves(backend: str) -> None:
    x, g = torch.randn(5, 3, 6), torch.randn(5, 6, 5)
    x[2, 1] = float("nan")
    out = pc.ops.conv_order(x, g, (2,), "median", groups=3)
    assert out.isnan().flatten(1).all(1).tolist() == [False, False, True, True, False, False]
    assert out.isnan().flatten(1).any(1).tolist() == [False, False, True, True, False, False]
