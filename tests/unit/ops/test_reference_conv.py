"""conv_reduce against F.conv1d, conv2d, conv3d and autograd, one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.materialised import assert_exactly, gradients
from support.strategies import dtypes, numbers, tails

import pycoherence as pc
from pycoherence.ops import Reduced

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(dtypes)
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    b, i, o = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))

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
    x = draw(numbers((b, i * groups, *size), dtype))
    out = FUNCTIONS[n](torch.zeros(1, *x.shape[1:]), torch.zeros(shape), **options)
    g = draw(numbers((b, *out.shape[1:]), dtype))
    return x, g, kernel, options, draw(tails(b, shape, dtype))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(calls())
def test_equals_materialised_gradients(call) -> None:
    x, g, kernel, options, tail = call
    shape, conv = (g.shape[1], x.shape[1] // options["groups"], *kernel), FUNCTIONS[len(kernel)]
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
