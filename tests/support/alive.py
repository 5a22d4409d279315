"""Whether steps of training keep tensors alive."""

import gc
from collections.abc import Callable

from torch import Tensor


def live() -> int:
    """How many tensors there are, also of what waits to be collected."""
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def live_tensors() -> int:
    gc.collect()
    return live()


def assert_keeps_nothing(step: Callable[[], None], times: int) -> None:
    """After a few steps, many more leave no tensor."""
    for _ in range(2):
        step()
    before = live_tensors()
    for _ in range(times):
        step()
    assert live_tensors() <= before


def assert_leaves_no_garbage(step: Callable[[], None]) -> None:
    """Activations held by cycles would pile up between collections."""
    step()
    before = live_tensors()
    gc.disable()
    try:
        for _ in range(20):
            step()
        after = live()
    finally:
        gc.enable()
    assert after <= before + 5
