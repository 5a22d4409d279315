"""Functions that torch.compile has made."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_INSIDE = (
    "a block of collect or aggregate cannot be opened inside a compiled function; compile the "
    "model, or a step without the block, and call it inside the block"
)


def expect_not_compiling() -> None:
    """Refuse to be made part of a compiled function.

    Raises:
        RuntimeError: This is being compiled. If the graph may break, torch then runs the function
            as it was written.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_INSIDE)


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled functions run as they were written, if there can be any yet.

    Raises:
        RuntimeError: One of them is running.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    expect_not_compiling()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(_INSIDE) from error
