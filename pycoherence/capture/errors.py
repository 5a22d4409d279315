"""How errors speak of parameters and functions."""

import functools
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any

from torch.overrides import resolve_name

from pycoherence.errors import UnsupportedError

_SHORT = {"torch.nn.functional.": "F.", "torch.functional.": "torch.", "torch.Tensor.": "Tensor."}


def describe(name: str) -> str:
    """A parameter as the error messages call it."""
    module, _, parameter = name.rpartition(".")
    return f"parameter {parameter!r} of " + (f"module {module!r}" if module else "the model itself")


@functools.cache
def function_name(function: Callable[..., Any]) -> str:
    """A torch function as users write it: `F.linear`, `torch.addmm`, `Tensor.mT`."""
    name = resolve_name(function)
    if name is None:
        private = isinstance(function, BuiltinFunctionType)
        return f"torch.{function.__name__}" if private else str(function)
    for module, short in _SHORT.items():
        if name.startswith(module):
            name = short + name.removeprefix(module)
    return name.removesuffix(".__get__")  # of a property


def unsupported(
    names: Sequence[str], function: Callable[..., Any] | None, why: str, fix: str
) -> UnsupportedError:
    """The error that a use of these parameters, in this function, cannot be measured."""
    first, *others = dict.fromkeys(names) or [""]
    who = describe(first) if first else ""
    if others:
        who += f" and {describe(others[0]) if len(others) == 1 else f'{len(others)} more'}"
    op = "" if function is None else function_name(function)
    where = ", used by ".join(part for part in (who, op) if part) or "the backward pass"
    return UnsupportedError(f"{where}: {why}. What to do: {fix}.")
