"""How a test of ops is told where to run."""

from collections.abc import Iterator

import pytest
import torch

import pycoherence as pc


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that ops run on, or a place of `backends.places_of`: new tensors lie there."""
    device, name = ("cpu", request.param) if isinstance(request.param, str) else request.param
    with torch.device(device), pc.backend(name):
        yield name
