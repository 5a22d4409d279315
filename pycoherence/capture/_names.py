"""How errors speak of parameters and functions."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.overrides import resolve_name

from pycoherence.errors import UnsupportedError


def describe(name: str) -> str:
    """A parameter as the error messages call it."""
    module, _, parameter = name.rpartition(".")
    return f"parameter {parameter!r} of " + (f"module {module!r}" if module else "the model itself")


def function_name(function: Callable[..., Any]) -> str:
    """A torch function by its public name."""
    return resolve_name(function) or str(function)


def unsupported(
    names: Sequence[str], function: Callable[..., Any] | None, why: str, fix: str
) -> UnsupportedError:
    """The error that a use of these parameters, in this function, cannot be measured."""
    who = " and ".join(describe(name) for name in names)
    op = "" if function is None else function_name(function)
    where = ", used by ".join(part for part in (who, op) if part) or "the backward pass"
    return UnsupportedError(f"{where}: {why}. What to do: {fix}.")
