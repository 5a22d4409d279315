"""Norms of the rows of several matrices on the emulated GPU agree with the reference."""

import numpy as np
import pytest
import torch

from pycoherence.ops.row_sq_norms import SPEC

BITS = {torch.bfloat16: torch.uint16}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(emulation, rows, tolerance=1e-14):
    arrays = [x.view(BITS.get(x.dtype, x.dtype)).numpy() for x in rows]
    found = np.full((len(rows), len(rows[0])), np.nan)
    emulation.row_sq_norms(arrays, found)
    expected = SPEC.reference([x.double() for x in rows]).numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 11])
def test_norms_of_all_widths(ordered, batch, dtype):
    check(ordered, [torch.randn(batch, n).to(dtype) for n in (1, 0, 31, 33, 129, 8200)])


def test_any_strides(emulation):
    x = torch.randn(10, 12)
    check(emulation, [x[:, ::3], x[:, 1:], x[:1, :10].mT.expand(10, 6), x.mT.clone().mT])


def test_as_many_matrices_as_a_launch_takes(emulation):
    check(emulation, [torch.randn(2, n % 5 + 1) for n in range(64)])


def test_numbers_whose_squares_leave_float32(emulation):
    check(emulation, [torch.tensor([[1e-30, 3e-30], [1e30, 3e30]])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(emulation, bad):
    x = torch.randn(3, 40)
    x[1, 33] = bad
    check(emulation, [x, torch.randn(3, 2)])
