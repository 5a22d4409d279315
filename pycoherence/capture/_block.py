"""While a block is open."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pycoherence.capture._compiled import uncompiled

# Function modes are per thread, and so is what must not be nested.
_open = threading.local()


@contextmanager
def only_block() -> Iterator[None]:
    """The only block of its thread, in which compiled functions run as they were written.

    Raises:
        RuntimeError: Another one is open, or a compiled function is running.
    """
    if getattr(_open, "one", False):
        raise RuntimeError(
            "the blocks of collect and aggregate cannot be nested: only one would see the "
            "parameters. What to do: ask one collect block for all statistics, measure and "
            "aggregate in passes of their own, and update meters outside both"
        )
    with uncompiled():
        _open.one = True
        try:
            yield
        finally:
            _open.one = False
