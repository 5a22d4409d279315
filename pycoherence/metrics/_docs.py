"""Sections of docstrings that most metrics share, written once."""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_ARGS = {
    "sum_sq_norm": "Squared norm of the sum of the gradients, a float or a tensor of any shape.",
    "total_sq_norm": "Sum of their squared norms, same shape as `sum_sq_norm`.",
    "n": "Number of gradients, at least 1.",
    "first_moment": "Mean of the gradients, a float or a tensor of any shape (a parameter's).",
    "second_moment": "Mean of their squares, coordinate by coordinate, same shape.",
    "sign_sum": (
        "Sum of the signs of the gradients, a float or a tensor of any shape (a parameter's)."
    ),
    "gram": "Dot products of the gradients with each other, `[B, B]`.",
    "dots": (
        "Dot products of the gradients with their mean, `[..., n]`; the last dimension is the "
        "whole sample, others may hold layers or steps."
    ),
    "sq_norms": "Their squared norms, same shape as `dots`.",
}

_SECTIONS = {
    "Args": "",
    "Returns": "\n    A float for floats, else a tensor of the same shape, float32 or better.\n\n",
    "Raises": (
        "\n    ValueError: A shape or a value is not as described above."
        "\n    TypeError: A tensor is not floating point, a count is no integer, or devices differ."
        "\n\n"
    ),
    "Cost": " elementwise.\n\n",
    "Source": "",
    "Example": "",
}


def documented(**args: str) -> Callable[[F], F]:
    """Add the sections that a metric's docstring leaves out, in the usual order.

    Args:
        **args: Descriptions of those parameters that have another meaning here, or only here.
    """

    def complete(function: F) -> F:
        text = inspect.getdoc(function)
        if text is None:  # python -OO
            return function
        body, *rest = re.split(rf"^({'|'.join(_SECTIONS)}):", text, flags=re.MULTILINE)
        own = dict(zip(rest[::2], rest[1::2], strict=True))
        described = _ARGS | args
        entries = [
            textwrap.fill(
                f"{name}: {described[name]}",
                width=96,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
            )
            for name in inspect.signature(function).parameters
            if "Args" not in own
        ]
        shared = _SECTIONS | {"Args": "\n" + "\n".join(entries) + "\n\n"}
        sections = (f"{name}:{own.get(name, text)}" for name, text in shared.items())
        function.__doc__ = body + "".join(sections)
        return function

    return complete
