"""The CUDA kernels, run by an emulation of a GPU."""

from collections.abc import Iterator
from types import ModuleType

import pytest
from support.emulated import ORDERS, build, load


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    """Runs blocks in the order they have."""
    build()
    return load()


@pytest.fixture(params=ORDERS)
def ordered(emulation: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Runs blocks in several orders, one after the other."""
    emulation.set_order(ORDERS.index(request.param))
    yield emulation
    emulation.set_order(0)
