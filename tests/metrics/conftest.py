"""The three numbers a metric takes, straight from a matrix of gradients."""

from collections.abc import Callable

import pytest
from torch import Tensor

Sums = Callable[[Tensor], tuple[Tensor, Tensor, int]]


def _sums(gradients: Tensor) -> tuple[Tensor, Tensor, int]:
    return gradients.sum(dim=0).square().sum(), gradients.square().sum(), len(gradients)


@pytest.fixture(scope="session")
def sums() -> Sums:
    """Return the function that takes gradients [n, P] to S, Q and n."""
    return _sums
