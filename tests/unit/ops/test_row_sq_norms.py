"""row_sq_norms against numbers that are known, on every backend."""

import pytest
import torch
from support.backends import on_each_place
from support.raising import raising

import pycoherence as pc

everywhere = on_each_place("row_sq_norms")


@everywhere
@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_any_number_of_matrices(backend: str, count: int) -> None:
    rows = [torch.full((3, n % 7), float(n)) for n in range(count)]
    found = pc.ops.row_sq_norms(rows)
    assert found.tolist() == [[n**2 * (n % 7)] * 3 for n in range(count)]


@everywhere
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_may_leave_the_range_of_float32(backend: str, size: float) -> None:
    found = pc.ops.row_sq_norms([torch.full((2, 40), size)])
    expected = torch.full((1, 2), 40 * size**2, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(backend: str, bad: float) -> None:
    rows = [torch.ones(3, 50), torch.ones(3, 2)]
    rows[0][1, 33] = bad
    found = pc.ops.row_sq_norms(rows)
    assert found.isfinite().tolist() == [[True, False, True], [True] * 3]
    assert found[0, 1].isnan() == (bad != bad)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_long_rows_keep_their_digits(backend: str, dtype: torch.dtype) -> None:
    """All of one sign, where rounding adds up."""
    x = torch.rand(1, 300_000).to(dtype)
    found = pc.ops.row_sq_norms([x])
    assert found.item() == pytest.approx((x.double() ** 2).sum().item(), rel=1e-6)


ROWS = torch.ones(2, 3)

test_value_errors = raising(
    ValueError,
    {
        "none": (lambda: pc.ops.row_sq_norms([]), r"one or more matrices \[B, n\].*got \[\]"),
        "batches": (
            lambda: pc.ops.row_sq_norms([ROWS, ROWS[:1]]),
            r"as many rows each, got \[\(2, 3\), \(1, 3\)\]",
        ),
        "3d": (lambda: pc.ops.row_sq_norms([ROWS[None]]), r"got \[\(1, 2, 3\)\]"),
    },
)

test_type_errors = raising(
    TypeError,
    {
        "mixed": (
            lambda: pc.ops.row_sq_norms([ROWS, ROWS.half()]),
            r"expected rows\[1\] to have the dtype and device of rows\[0\]",
        ),
        "integer": (lambda: pc.ops.row_sq_norms([ROWS.int()]), r"rows\[0\] to be float16"),
    },
)


def test_any_of_the_matrices_may_require_a_gradient() -> None:
    """A list hides it from torch; nothing is given back, and that is said."""
    for i in range(2):
        rows = [ROWS.clone().requires_grad_(i == j) for j in range(2)]
        found = pc.ops.row_sq_norms(rows)
        with pytest.raises(RuntimeError, match=r"row_sq_norms.*not differentiable"):
            found.sum().backward()
