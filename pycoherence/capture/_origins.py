"""Where the tensors of a forward pass come from, as far as no example has a part in them."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Own = Callable[[], Tensor]


class Made(NamedTuple):
    """What a forward pass made of parameters alone.

    Attributes:
        names: Of the parameters.
        source: With its graph.
        alone: The same without it, which takes its place in captured calls; maybe in another
            dtype.
        own: Makes it once more, of rows that are each an example's own, if it can be so.
    """

    names: tuple[str, ...]
    source: Tensor
    alone: Tensor
    own: Own | None = None


class Seen(NamedTuple):
    """What the arguments of a torch function are.

    Attributes:
        names: Tracked parameters, or those that an argument is made of, each as often as it comes.
        fixed: Whether all other tensors are parameters, buffers, and made of these.
        alone: Whether examples may have a part in none of them: they are fixed or newly made.
        any: Whether there are tensors at all; what is made of none may have a row for each example
            all the same, but for `torch.eye`.
    """

    names: list[str]
    fixed: bool
    alone: bool
    any: bool


class Origins:
    """Tells tracked parameters, and what is made of them, from tensors of examples.

    Args:
        modules: Of the model: their parameters and buffers are the same for all examples.
        parameters: The tracked parameters, by name.
    """

    def __init__(self, modules: Iterable[nn.Module], parameters: Mapping[str, Tensor]) -> None:
        self._names: dict[int, tuple[str, ...]] = {id(p): (name,) for name, p in parameters.items()}
        self._made: dict[int, Made] = {}
        self._fixed: dict[int, weakref.ref[Tensor]] = {}
        self._new: dict[int, weakref.ref[Tensor]] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}
        for module in modules:
            for x in (*module._parameters.values(), *module._buffers.values()):
                if x is not None and id(x) not in self._names:
                    self._fixed[id(x)] = weakref.ref(x)

    def names_of(self, value: Any) -> tuple[str, ...]:
        """The tracked parameters that a tensor is, or is made of."""
        return self._names.get(id(value), ())

    def made(self, value: Any) -> Made | None:
        """How a tensor was made of parameters alone, unless it is one."""
        return self._made.get(id(value))

    @property
    def any_made(self) -> bool:
        """Whether anything has been made of parameters."""
        return bool(self._made)

    def forget(self, name: str) -> None:
        """Take a parameter, and what is made of it, for an ordinary tensor."""
        self._names = {key: names for key, names in self._names.items() if name not in names}

    def clear(self) -> None:
        """Take all tensors for ordinary ones."""
        for known in (self._names, self._made, self._fixed, self._new, self._casts):
            known.clear()

    def look_at(self, *values: Any) -> Seen:
        """What the arguments of a function are."""
        names, fixed, alone, found = list[str](), True, True, False
        for x in tensors(values):
            found = True
            key = id(x)
            if key in self._names:
                names += self._names[key]
            elif not _is(self._fixed, x):
                fixed = False
                alone &= _is(self._new, x)
        return Seen(names, fixed, alone, found)

    def note(self, result: Any, seen: Seen, own: Own | None = None) -> None:
        """Remember where the results of a function come from that no example has a part in."""
        for x in tensors(result):
            if id(x) in self._names:
                continue
            if seen.names and x.grad_fn is not None:
                made = Made(tuple(dict.fromkeys(seen.names)), x, x.detach().requires_grad_(), own)
                for alias in (x, made.alone):
                    self._names[id(alias)], self._made[id(alias)] = made.names, made
            elif seen.any and seen.fixed:
                self._fixed[id(x)] = weakref.ref(x)
            else:
                self._new[id(x)] = weakref.ref(x)

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter, or what was made of some, in another dtype for captured calls."""
        version, found = self._casts.get((id(value), dtype), (-1, value))
        if version != value._version:
            made = self.made(value)
            source = value if made is None else made.source
            found = value.detach().to(dtype).requires_grad_()
            self._names[id(found)] = names = self.names_of(value)
            self._made[id(found)] = Made(names, source, found)
            self._casts[id(value), dtype] = value._version, found
        return found

    def alone(self, value: Any) -> Any:
        """What stands for a value in a captured call: without its graph, if it was made."""
        return self._made[id(value)].alone if id(value) in self._made else value

    def spoil(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Forget where tensors came from that a function has written examples into."""
        written = [kwargs["out"]] if "out" in kwargs else []
        if getattr(func, "__name__", "").endswith("_"):
            written += args[:1]
        for x in tensors(written):
            for changed in (x, x._base):
                self._fixed.pop(id(changed), None)
                self._new.pop(id(changed), None)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    found: list[Tensor] = []
    _collect((value,), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def _is(known: Mapping[int, "weakref.ref[Tensor]"], x: Tensor) -> bool:
    found = known.get(id(x))
    return found is not None and found() is x


def unique(names: Iterable[str]) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(names))
