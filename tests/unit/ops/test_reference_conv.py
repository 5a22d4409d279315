"""conv_reduce against F.conv1d, conv2d, conv3d and autograd, one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.materialised import assert_exactly, gradients
from support.strategies import CONVOLUTIONS, convolved, tails

import pycoherence as pc
from pycoherence.ops import Reduced


@st.composite
def calls(draw: st.DrawFn):
    (x, g), kernel, options, shape = draw(convolved(3, 1))
    return x, g, kernel, options, draw(tails(len(x), shape, x.dtype))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, kernel, options, tail = call
    shape, conv = (g.shape[1], x.shape[1] // options["groups"], *kernel), CONVOLUTIONS[len(kernel)]
    wide = x.double()
    rows = gradients(lambda w, b: conv(wide[b : b + 1], w, **options), shape, g)

    def run() -> Reduced:
        return pc.ops.conv_reduce(x, g, kernel, **options, **tail)

    assert_exactly("conv_reduce", run, rows, tail)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_number_stands_for_every_dimension(n: int) -> None:
    x, g = torch.randn(2, 4, *[9] * n), torch.randn(2, 6, *[4] * n)
    one = pc.ops.conv_reduce(x, g, [3] * n, stride=2, padding=1, dilation=2, groups=2)
    each = {"stride": [2] * n, "padding": (1,) * n, "dilation": (2,)}
    many = pc.ops.conv_reduce(x, g, (3,) * n, groups=2, **each)
    assert torch.equal(one.sq_norms, many.sq_norms)


def test_depthwise_groups_are_not_overcounted() -> None:
    """Each output channel sees one input channel; a sum over all channels would be too large."""
    x, g = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 8, 4, dtype=torch.float64)
    rows = gradients(lambda w, b: F.conv1d(x[b : b + 1], w, groups=4), (8, 1, 2), g)
    actual = pc.ops.conv_reduce(x, g, (2,), groups=4).sq_norms
    torch.testing.assert_close(actual, rows.flatten(1).square().sum(1))


def test_no_channels_give_zeros() -> None:
    x, g = torch.ones(2, 0, 5), torch.ones(2, 3, 4)
    out = pc.ops.conv_reduce(x, g, (2,), want=("sq_norms", "weighted_sum"))
    assert out.sq_norms.tolist() == [0, 0]
    assert out.weighted_sum.shape == (3, 0, 2)
