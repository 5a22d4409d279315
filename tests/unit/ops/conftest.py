"""How a test of ops is told where to run."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A place of `backends.places_of`: the name of the backend; new tensors lie on the device."""
    device, name = request.param
    with torch.device(device):
        yield name
