"""conv_order against F.conv1d, conv2d, conv3d and autograd, and scalar Python."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.backends import backends_of
from support.materialised import gradients
from support.plain_rules import ROUNDING, assert_aggregated
from support.strategies import dtypes, nonfinite, numbers, orders, spoiled
from torch import Tensor

import pycoherence as pc

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def calls(draw: st.DrawFn):
    dtype, n, groups = draw(dtypes), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    b, i, o = draw(st.integers(0, 7)), draw(st.integers(1, 2)), draw(st.integers(1, 2))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(n)]

    size, kernel = each(1, 6 if n < 3 else 4), each(1, 3 if n < 3 else 2)
    options = {"dilation": each(1, 2), "groups": groups}
    kind = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    options |= {"stride": each(1, 3) if kind != "same" else 1}
    options |= {"padding": each(0, 2) if kind == "numbers" else kind}
    shape = (o * groups, i, *kernel)
    pad = options["padding"] if kind == "numbers" else [10 if kind == "same" else 0] * n
    fits = zip(size, pad, kernel, options["dilation"], strict=True)
    assume(all(s + 2 * p > d * (k - 1) for s, p, k, d in fits))
    x = draw(spoiled(draw(numbers((b, i * groups, *size), dtype))))
    out = FUNCTIONS[n](torch.zeros(1, *x.shape[1:]), torch.zeros(shape), **options)
    g = draw(spoiled(draw(numbers((b, *out.shape[1:]), dtype))))
    return x, g, kernel, options, *draw(orders(b))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, kernel, options, rule, k, drop = call
    shape, conv = (g.shape[1], x.shape[1] // options["groups"], *kernel), FUNCTIONS[len(kernel)]
    wide = x.double()
    rows = gradients(lambda w, b: conv(wide[b : b + 1], w, **options), shape, g)

    def run() -> Tensor:
        return pc.ops.conv_order(x, g, kernel, rule, k, nonfinite=nonfinite(drop), **options)

    assert_aggregated("conv_order", run, rows, rule, k, drop, ROUNDING[x.dtype])


@pytest.mark.parametrize("backend", backends_of("conv_order"))
def test_depthwise_channels_keep_to_themselves(backend: str) -> None:
    x, g = torch.randn(5, 3, 6), torch.randn(5, 6, 5)
    x[2, 1] = float("nan")
    with pc.backend(backend):
        out = pc.ops.conv_order(x, g, (2,), "median", groups=3)
    assert out.isnan().flatten(1).all(1).tolist() == [False, False, True, True, False, False]
    assert out.isnan().flatten(1).any(1).tolist() == [False, False, True, True, False, False]
