"""Gradients for metrics: some whose angles are known, some drawn; and what is as expected."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

# At 0, 90, 180 and 45 degrees; the norms differ, and cosines must not care.
GRADIENTS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
GRAM = GRADIENTS @ GRADIENTS.T
HALF = 0.5**0.5
"""The cosine of 45 degrees."""


def equal(result: Tensor, expected: Any, tolerance: float = 1e-12) -> None:
    expected = torch.tensor(expected, dtype=result.dtype)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@st.composite
def gradient_lists(draw: st.DrawFn, min_n: int = 1) -> Tensor:
    """Draw gradients [n, P] of small integers: zeros, ties and opposites are common among them."""
    n, size = draw(st.integers(min_n, 6)), draw(st.integers(1, 4))
    rows = st.lists(st.integers(-3, 3), min_size=size, max_size=size)
    drawn = draw(st.lists(rows, min_size=n, max_size=n))
    return torch.tensor(drawn, dtype=torch.float64)
