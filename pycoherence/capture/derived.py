"""Tensors that are made of parameters and constants alone, and how to make them again."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pycoherence.capture.facts import tensors, version_of


class Recipe(NamedTuple):
    """The function that made a tensor, and its arguments, if calling it again gives the same.

    Attributes:
        function: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        versions: How often these had been written into, all together.
        version: How often its result had.
        at: Which of its results it is.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: int
    at: int
    version: int

    def holds(self, source: Tensor) -> bool:
        """Whether nothing has been written into its arguments or its result since."""
        if version_of(source) != self.version:
            return False
        return self.versions == sum(version_of(x) for x in tensors((self.args, self.kwargs)))


class Derived:
    """A tensor that a forward pass made of parameters, with no example in it.

    Attributes:
        source: The tensor, with its graph.
        recipe: How it was made, if that can be done again.
        promoted: The tensors made of it with a copy for each example, and their owners.
    """

    __slots__ = ("_stand_in", "_version", "promoted", "recipe", "source")

    def __init__(
        self,
        source: Tensor,
        recipe: Recipe | None,
        stand_in: Tensor | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.promoted: list[tuple[Any, Tensor]] = []
        self._stand_in = stand_in
        self._version = version_of(source)

    @property
    def stand_in(self) -> Tensor:
        """The tensor without its graph, which takes its place in captured calls."""
        if self._stand_in is None or self._version != version_of(self.source):
            self._version = version_of(self.source)
            self._stand_in = self.source.detach()
        return self._stand_in
