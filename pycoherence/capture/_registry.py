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
    """Teach the capture a torch function that uses parameters.

    The handler is called in place of the function wherever that meets a tracked parameter, and has
    to return what the function would, by an autograd Function whose backward gives the factors of
    each example's gradient, `G_b`, as a site. `docs/custom-layers.md` has a worked example.

    Args:
        function: As `__torch_function__` sees it, such as `torch.nn.functional.linear`, or
            `torch.ops.library.op.default`. One that is known already gets another handler, for the
            whole process.

    Returns:
        A decorator for a handler, which takes the `Capture` and then the arguments of `function`.
        It may return `NotImplemented`: the call is then that of an unknown function.

    Raises:
        TypeError: `function` is not callable.

    Cost: None but what the handler costs.

    Example:
        >>> import torch, pycoherence as pc
        >>> def doubled(x):
        ...     return 2 * x
        >>> @pc.register_site(doubled)  # if torch called it
        ... def handle(capture, x):
        ...     capture.refuse("it is only an example", "use x + x")
    """
    if not callable(function):
        raise TypeError(f"expected a torch function, got {type(function).__name__}")

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
