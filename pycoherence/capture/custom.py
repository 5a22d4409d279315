"""Functions that users teach the capture."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from pycoherence.capture.context import CallContext, handlers
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.sites import Site

C = TypeVar("C", bound=type[LayerRule])


def register_site(function: Callable[..., Any]) -> Callable[[C], C]:
    """Teach the capture a torch function that uses parameters.

    The decorated class is a `pycoherence.LayerRule` whose `forward` takes what the function takes:
    first its input, whose rows are examples or positions of examples, then parameters and options,
    by the names the function has for them. `docs/custom-layers.md` has a worked example.

    Args:
        function: The function that `__torch_function__` sees, such as `torch.nn.functional.linear`
            or `torch.ops.library.op.default`. One that is known already gets another rule, for the
            whole process.

    Returns:
        A decorator for a `LayerRule`.

    Raises:
        TypeError: `function` is not callable, or no `LayerRule` is decorated.

    Cost: None but what the rule costs.

    Example:
        >>> import torch, pycoherence as pc
        >>> def doubled(x, weight):
        ...     return 2 * x @ weight.T
        >>> @pc.register_site(doubled)  # if torch called it
        ... class Doubled(pc.LayerRule):
        ...     def forward(self, x, weight):
        ...         return doubled(x, weight), (x, weight)
        ...     def factors(self, rows, g, x, weight):
        ...         return [pc.sites.LinearSite(rows(x), rows(2 * g))]
        ...     def input_grad(self, g, x, weight):
        ...         return 2 * g @ weight
    """
    if not callable(function):
        raise TypeError(f"expected a torch function, got {type(function).__name__}")

    def decorate(rule: C) -> C:
        if not (isinstance(rule, type) and issubclass(rule, LayerRule)):
            raise TypeError(f"expected a class derived from pycoherence.LayerRule, got {rule!r}")
        signature = inspect.signature(rule.forward)

        def handle(c: CallContext, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(None, *args, **kwargs)
            bound.apply_defaults()
            values = list(bound.arguments.values())[1:]
            names = [isinstance(v, Tensor) and bool(c.names_of(v)) for v in values[1:]]
            call = _Bound(rule(), values[1:], names)
            given = [v for v, is_one in zip(values[1:], names, strict=True) if is_one]
            found = c.layer(call, values[0], *given)
            if found is not NotImplemented:
                c.mark_like(found, values[0], call.features)
            return found

        handle.__module__ = rule.__module__
        handlers[function] = handle
        return rule

    return decorate


class _Bound(LayerRule):
    """A rule of a user with the arguments of one call, parameters among them."""

    def __init__(self, rule: LayerRule, values: list[Any], names: list[bool]) -> None:
        self._rule, self._values, self._names = rule, values, names
        self.features = rule.features

    def forward(self, x: Tensor, *parameters: Any) -> tuple[Any, Kept]:
        given = iter(parameters)
        each = [
            next(given) if is_one else v
            for v, is_one in zip(self._values, self._names, strict=True)
        ]
        return self._rule.forward(x, *each)

    def input_grad(self, g: Any, *kept: Any) -> Tensor | None:
        return self._rule.input_grad(g, *kept)

    def factors(self, rows: Rows, g: Any, *kept: Any) -> list[Site | None]:
        found = list(self._rule.factors(rows, g, *kept))
        if len(found) != sum(self._names):
            raise TypeError(
                f"expected {type(self._rule).__name__}.factors to return a site for each of "
                f"{sum(self._names)} parameters, got {len(found)}"
            )
        return found
