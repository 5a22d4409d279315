"""dense_gram in Triton's interpreter, which has only half precision to interpret."""

import pytest
import torch
from support.backends import TOLERANCE, assert_close, in_float64
from support.settings import workspace
from torch import Tensor

from pycoherence.ops.dense_gram import SPEC
from pycoherence.triton_kernels.dense_gram import dense_gram

DTYPES = [torch.float16, torch.float32, torch.float64]

# B1, B2, P
SHAPES = [(3, 5, 33), (20, 1, 70), (1, 1, 1), (2, 3, 1100), (0, 2, 4), (4, 0, 3), (4, 3, 0)]


def check(a: Tensor, b: Tensor | None) -> None:
    found, expected = dense_gram(a, b), SPEC.reference(*in_float64((a, b)))
    assert_close(found, expected, TOLERANCE[a.dtype])
    assert found.dtype == SPEC.fake(a, b).dtype
    assert found.is_contiguous()
    assert b is not None or torch.equal(found, found.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b1", "b2", "p"), SHAPES)
def test_agrees_with_the_reference(b1: int, b2: int, p: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(b1, p).to(dtype), torch.randn(b2, p).to(dtype)
    check(a, None)
    check(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_in_a_small_workspace(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 300).to(dtype)[:, ::2], torch.randn(150, 3).to(dtype).mT
    rows, column = a[0].expand(3, 150), a[:, :1].expand(4, 150)
    with workspace(100):
        for one, two in ((a, None), (b, None), (a, b), (b, a), (rows, column), (column, None)):
            check(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_keep_their_digits(dtype: torch.dtype) -> None:
    """All of one sign, where rounding adds up."""
    check(torch.rand(2, 70_000).to(dtype), None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, bad: float) -> None:
    a = torch.randn(3, 5).to(dtype)
    a[1, 2] = bad
    found = dense_gram(a, None).isfinite()
    assert found[::2, ::2].all()
    assert not found[1].any()
