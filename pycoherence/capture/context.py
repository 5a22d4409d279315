"""The side of a capture that `functions/` sees, and the registration of functions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from pycoherence.capture.derived import Derived
from pycoherence.capture.facts import Facts, Owner
from pycoherence.capture.groups import Groups
from pycoherence.capture.layer import LayerRule
from pycoherence.capture.request import Request
from pycoherence.capture.results import Results
from pycoherence.capture.rules import Rule

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)


class CallContext(Protocol):
    """A capture, as the rules of functions see it."""

    request: Request
    results: Results
    count: int | None
    groups: Groups
    inside: Tensor | None

    @property
    def used(self) -> Sequence[str]:
        """The tracked parameters that the function being called meets."""
        ...

    @property
    def function_name(self) -> str:
        """The function being called, as users write it."""
        ...

    def facts(self, x: Tensor) -> Facts:
        """The facts of a tensor."""
        ...

    def put(self, x: Tensor, facts: Facts) -> None:
        """Say what a tensor is."""
        ...

    def mark_shared(self, x: Tensor) -> None:
        """Say that no example has a part in a tensor."""
        ...

    def mark(self, x: Tensor, owner: Owner) -> None:
        """Say whose elements a tensor holds."""
        ...

    def rewrite(self, x: Tensor, owner: Owner) -> None:
        """Say whose elements a tensor with views holds after it was written."""
        ...

    def names_of(self, x: Any) -> tuple[str, ...]:
        """The tracked parameters that a tensor is made of, with no example in it."""
        ...

    def settle(self, owner: Owner, x: Tensor) -> None:
        """Learn how many examples there are, or refuse another number."""
        ...

    def layer(self, rule: LayerRule, inputs: Any, *parameters: Tensor | None) -> Any:
        """Call a function of examples and parameters as a captured one."""
        ...

    def apply(
        self, rule: Any, rows: Any, inputs: Sequence[Tensor], parameters: Sequence[Tensor | None]
    ) -> Any:
        """Call it with an arrangement that is known."""
        ...

    def dispatch(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule | None = None,
    ) -> Any:
        """Call a function as the model does."""
        ...

    def note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule,
        seen: list[tuple[Tensor, Facts]],
        result: Any,
        *,
        firm: bool = False,
    ) -> None:
        """Remember whose elements the results of a function hold."""
        ...

    def make(self, function: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        """Apply a function to a parameter, or to a tensor made of some."""
        ...

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in another dtype; a parameter keeps gradients of its own dtype."""
        ...

    def tracked(self) -> AbstractContextManager[None]:
        """A context in which torch functions are seen as if the model called them."""
        ...

    def known(self, x: Tensor) -> bool:
        """Whether it has been said what a tensor is."""
        ...

    def is_example(self, x: Tensor) -> bool:
        """Whether examples have a part in a tensor."""
        ...

    def declare(self, x: Tensor, dim: int) -> None:
        """Say which dimension of a tensor from outside is the batch."""
        ...

    def share_soft(self, x: Tensor) -> None:
        """Say that no dimension of a tensor from outside is the batch."""
        ...

    def by_rows(self, x: Tensor) -> None:
        """Say that the first dimension of a tensor is the batch."""
        ...

    def mark_like(self, found: Any, x: Tensor, features: int) -> None:
        """Say that a result has the rows of an input."""
        ...

    def aligned(self, x: Tensor, dim: int, other: Tensor, place: int) -> Tensor:
        """A tensor whose dimension is the batch, beside another tensor."""
        ...

    def owner_by_index(self, p: Tensor, pick: Callable[[Tensor], Tensor], index: Any) -> Any:
        """Whose the elements are that indices pick from what all examples share."""
        ...

    def skip(self, names: Sequence[str]) -> None:
        """Measure parameters no longer."""
        ...

    def refuse(self, why: str, fix: str) -> NoReturn:
        """Raise the `UnsupportedError` for the function being called."""
        ...

    def refuse_lost(self, owner: Any, x: Tensor) -> NoReturn:
        """Refuse a tensor whose owner is not known."""
        ...

    def refuse_rows(self, x: Tensor) -> NoReturn:
        """Refuse a tensor with other rows than the batch."""
        ...


handlers: dict[Callable[..., Any], Handler] = {}
"""A handler carries out a torch function in which parameters meet examples."""

decompositions: set[Callable[..., Any]] = set()
"""Functions whose handlers call others, which are seen one by one."""

guards: dict[Callable[..., Any], Handler] = {}
"""A guard looks at every call of a torch function of examples, with parameters or without."""


def register_function(*functions: Callable[..., Any]) -> Callable[[F], F]:
    """Register what carries a torch function out as a captured call.

    It is called with the `CallContext` and the arguments of the function, and returns what the
    function would, or `NotImplemented` where the call is that of an unknown function.
    """

    def decorate(handler: F) -> F:
        for function in functions:
            handlers[function] = handler
        return handler

    return decorate


def register_decomposition(*functions: Callable[..., Any]) -> Callable[[F], F]:
    """Register plain torch code for a function; what it calls is seen as if the model did."""

    def decorate(handler: F) -> F:
        for function in functions:
            handlers[function] = handler
            decompositions.add(function)
        return handler

    return decorate


def register_guard(*functions: Callable[..., Any]) -> Callable[[F], F]:
    """Register a check that every call of a function with examples must pass."""

    def decorate(guard: F) -> F:
        for function in functions:
            guards[function] = guard
        return guard

    return decorate


__all__ = ["CallContext", "Derived"]
