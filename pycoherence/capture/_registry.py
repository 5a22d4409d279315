"""Which torch functions are understood."""

from collections.abc import Callable
from typing import Any, TypeVar

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)

handlers: dict[Callable[..., Any], Handler] = {}
"""What carries out a torch function that uses tracked parameters."""

guards: dict[Callable[..., Any], Handler] = {}
"""What looks at every call of a torch function, whether or not it uses tracked parameters."""


spreaders: dict[Callable[..., Any], Handler] = {}
"""What may give each example its own copy of what is made of parameters alone."""


def register_site(function: Callable[..., Any]) -> Callable[[F], F]:
    """Register the handler of a torch function.

    Args:
        function: As `__torch_function__` sees it, such as `torch.nn.functional.linear`.

    Returns:
        A decorator for a handler, which takes the `Capture` and then the arguments of `function`,
        and returns what `function` would.
    """

    def decorate(handler: F) -> F:
        handlers[function] = handler
        return handler

    return decorate


def register_spreader(function: Callable[..., Any]) -> Callable[[F], F]:
    """Register what looks at a function of parameters alone; it may return `NotImplemented`."""

    def decorate(handler: F) -> F:
        spreaders[function] = handler
        return handler

    return decorate


def register_guard(function: Callable[..., Any]) -> Callable[[F], F]:
    """Register a check that every call of a torch function must pass; arguments as a handler's."""

    def decorate(guard: F) -> F:
        guards[function] = guard
        return guard

    return decorate
