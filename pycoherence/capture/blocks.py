"""While a block is open: one for each thread, in which compiled functions run as written."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pycoherence.capture.torch_internals import leave_mode

_INSIDE = (
    "a block of collect or aggregate cannot be opened inside a compiled function; compile the "
    "model, or a step without the block, and call it inside the block"
)

# Function modes are per thread, and so is what must not be nested.
_open = threading.local()


def _nothing() -> None:
    """The capture of a block that rests."""


class Mode(TorchFunctionMode):
    """Hands every torch function to a capture, which it does not keep alive.

    Torch holds the mode until it is left. A block that was entered and never left thus ends when
    nothing else holds its capture: the mode then does nothing, and the next block takes it away.
    """

    def __init__(self, capture: Any) -> None:
        super().__init__()
        self._capture: Callable[[], Any] = weakref.ref(capture)

    def rest(self) -> None:
        """Show no more functions to the capture."""
        self._capture = _nothing

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        capture = self._capture()
        if capture is None:
            return func(*args, **(kwargs or {}))
        return capture.see(func, args, kwargs or {})


class Block:
    """The only block of its thread.

    Args:
        capture: The capture that sees the torch functions in it; it is not kept alive.
        mode: The mode that shows them to it.
    """

    def __init__(self, capture: Any, mode: Mode) -> None:
        self._capture: Callable[[], Any] = weakref.ref(capture)
        self._mode = mode
        self._is_open = False

    @property
    def capture(self) -> Any:
        """The capture, if anything still holds it."""
        return self._capture()

    def open(self) -> None:
        """Open it.

        Raises:
            RuntimeError: Another one is open, or a compiled function is running.
        """
        other: Block | None = getattr(_open, "block", None)
        if other is not None and other.capture is None:
            other.close()  # it was never left, and nothing holds it
        elif other is not None:
            raise RuntimeError(
                "the blocks of collect and aggregate cannot be nested: only one would see the "
                "parameters. What to do: ask one collect block for all statistics, measure and "
                "aggregate in passes of their own, and update meters outside both; a block that "
                "was entered and never left, as by an exception between two hooks, is ended by "
                "pc.close_blocks()"
            )
        _as_written.enter()
        self._is_open = True
        self._mode.__enter__()
        _open.block = self

    def rest(self) -> None:
        """See no more functions, in one of them too; the next block closes it if nothing else does.

        A mode cannot be left inside a function that it sees, such as a backward pass.
        """
        self._capture = _nothing
        self._mode.rest()

    def close(self) -> None:
        """Close it, if it is still open."""
        if getattr(_open, "block", None) is self:
            _open.block = None
            leave_mode(self._mode)
            self._end()

    def __del__(self) -> None:
        self._end()  # of a thread that ended in it

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            _as_written.leave()


def current() -> Any:
    """The capture of the open block of this thread, if there is one."""
    block: Block | None = getattr(_open, "block", None)
    return None if block is None else block.capture


def resting(
    around: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """Give what a backward pass runs inside, at whose end its block sees no more functions."""

    @contextmanager
    def run() -> Iterator[None]:
        try:
            with around():
                yield
        finally:
            current().rest()

    return run


def close_blocks() -> None:
    """Leave the block of this thread that was entered and never left, if there is one.

    A `with` statement leaves its block whatever happens. Code that enters in one hook and leaves in
    another, or a notebook whose cell was interrupted, may not.

    Cost: None.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1)
        >>> never_left = pc.collect(model, pc.SqNorms())
        >>> record = never_left.__enter__()
        >>> pc.close_blocks()
        >>> with pc.collect(model, pc.SqNorms()) as record:
        ...     model(torch.ones(3, 2)).sum().backward()
        >>> record.batch_size
        3
    """
    block: Block | None = getattr(_open, "block", None)
    if block is not None:
        block.close()


def expect_not_compiling() -> None:
    """Refuse to be made part of a compiled function.

    Raises:
        RuntimeError: This is being compiled. If the graph may break, torch then runs the function
            as it was written.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_INSIDE)


class _AsWritten:
    """Lets compiled functions run as they were written while a block of any thread is open.

    Torch has one stance for all threads, and threads leave their blocks in any order.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a block may end wherever memory is freed
        self._blocks = 0
        self._stance: AbstractContextManager[Any] | None = None

    def enter(self) -> None:
        """Count a block, and take the stance if there can be compiled functions yet."""
        expect_not_compiling()
        with self._lock:
            self._blocks += 1  # first: a block that ends meanwhile gives no stance back then
            if self._stance is None and "torch._dynamo" in sys.modules:
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError as error:
                    self._blocks -= 1
                    raise RuntimeError(_INSIDE) from error
                self._stance.__enter__()

    def leave(self) -> None:
        """Count a block less, and give the stance back after the last."""
        with self._lock:
            self._blocks -= 1
            if not self._blocks and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_as_written = _AsWritten()
