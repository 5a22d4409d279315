"""What metrics take, straight from gradients, and the toy problem whose answers are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Sums = Callable[[Tensor], tuple[Tensor, Tensor, int]]


def _sums(gradients: Tensor) -> tuple[Tensor, Tensor, int]:
    return gradients.sum(dim=0).square().sum(), gradients.square().sum(), len(gradients)


@pytest.fixture(scope="session")
def sums() -> Sums:
    """Return the function that takes gradients [n, P] to S, Q and n."""
    return _sums


@pytest.fixture
def toy() -> Tensor:
    """Return gradients [4, 6] of the toy problem: own coordinates 0 to 3, none in 4, shared 5."""
    gradients = -torch.eye(4, 6, dtype=torch.float64)
    gradients[:, 5] = -1.0
    return gradients
