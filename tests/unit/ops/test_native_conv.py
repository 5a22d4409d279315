"""Convolutions on the native backend: layouts in memory, uneven windows, and how much they hold."""

import resource
import sys

import pytest
import torch
from support.backends import assert_reduced_close, backends_of, in_float64
from torch import Tensor

import pycoherence as pc

pytestmark = pytest.mark.skipif("native" not in backends_of("conv_reduce"), reason="not built")

# Channels in and out, kernel, stride, padding, dilation, groups, of inputs of 9 by 10.
WINDOWS = [
    (3, 8, 3, 1, 1, 1, 1),
    (17, 40, 3, 2, 1, 1, 1),
    (9, 5, 1, 1, 0, 1, 1),
    (8, 9, 1, 1, 2, 1, 1),
    (16, 12, 1, 2, 0, 1, 1),
    (34, 6, 3, 1, 2, 2, 2),
    (37, 37, 3, 1, 1, 1, 37),
    (64, 64, 2, 2, 0, 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("g_last", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_either_layout_in_memory(
    window: tuple[int, ...], x_last: bool, g_last: bool, dtype: torch.dtype
) -> None:
    i, o, kernel, stride, padding, dilation, groups = window
    options = [[kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2]
    out = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in (9, 10)]
    layouts = {False: torch.contiguous_format, True: torch.channels_last}
    x = torch.randn(3, i, 9, 10, dtype=dtype).to(memory_format=layouts[x_last])
    g = torch.randn(3, o, *out, dtype=dtype).to(memory_format=layouts[g_last])
    coef = torch.randn(3, dtype=dtype)
    direction = torch.randn(o, i // groups, kernel, kernel, dtype=dtype)
    args = (x, g, *options, groups, coef, direction, 127)
    with pc.backend("native"):
        actual: tuple[Tensor, ...] = torch.ops.pycoherence.conv_reduce(*args)
    expected = pc.ops.specs["conv_reduce"].reference(*in_float64(args))
    assert_reduced_close(actual, expected, 1e-11 if dtype == torch.float64 else 1e-5, str(window))


def peak() -> int:
    """Bytes that this process has held at most."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def test_a_long_convolution_holds_no_table_of_all_patches() -> None:
    """Of 2^28 taps times positions."""
    x, g = torch.randn(1, 2, 2**17 - 1), torch.randn(1, 2, 2**17 - 2**11)
    before = peak()
    with pc.backend("native"):
        out = pc.ops.conv_reduce(x, g, [2**11], want=("weighted_sum",))
    assert peak() - before < 2**28
    assert out.weighted_sum is not None
    for tap in (0, 1, 2**11 - 1):
        patch = x[0, :, tap : tap + g.shape[2]].double()
        truth = (g[0].double() @ patch.T).float()
        torch.testing.assert_close(out.weighted_sum[:, :, tap], truth, rtol=1e-4, atol=1e-2)
