"""All that a trace depends on beside its inputs: what Python and torch are set to."""

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycoherence.capture import modules_of
from pycoherence.ops import workspace
from pycoherence.ops.core.dispatch import forced_backend

_PLAIN = frozenset(
    (
        *(bool, int, float, complex, str, bytes, type(None), type(...)),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    )
)
_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every module that are no settings."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_MOST = 256
"""Items of a container that are looked at; of larger ones the length alone."""


def ambient() -> tuple[Any, ...]:
    """The switches of torch and of this library that decide what a pass computes."""
    cuda = torch.backends.cuda
    cudnn = torch.backends.cudnn
    return (
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # pyright: ignore
        torch.get_float32_matmul_precision(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.allow_tf32,
        torch.backends.mkldnn.enabled,
        workspace(),
        forced_backend(),
    )


class Place(NamedTuple):
    """A name under which Python finds a tensor.

    Attributes:
        words: It, for messages.
        get: Looks it up; `None` if it is gone.
    """

    words: str
    get: Callable[[], Any]


class PythonState:
    """The settings that a model, and functions that are called with it, keep in Python.

    Modules are looked at with their plain attributes, and functions with what they take from around
    them: closures, defaults, and the globals that they name. Containers and plain objects in these
    are looked into, a few levels deep.

    Args:
        model: Whose modules.
        others: Functions, and objects such as statistics and rules.
    """

    def __init__(self, model: nn.Module, others: Iterable[Any]) -> None:
        self._model = model
        self._others = tuple(others)

    def now(self, keep: list[Any] | None = None) -> tuple[Any, ...]:
        """It, as a value that is equal as long as nothing has changed.

        Args:
            keep: Takes the objects that the value tells by their `id`.
        """
        look = _Look(keep)
        modules = modules_of(self._model)
        found = [(type(module), self._of_module(module, look)) for _, module in modules]
        return (*found, *(look.value(x, 4) for part in self._around() for _, x in part))

    def _of_module(self, module: nn.Module, look: "_Look") -> Any:
        values = vars(module)
        hooks = [len(values[name]) for name in _HOOKS]
        return [(name, look.value(x, 3)) for name, x in values.items() if name not in _OWN], hooks

    def _around(self) -> Iterator[list[tuple[Place, Any]]]:
        """All that functions of the user take from around them, each place and its value now."""
        seen = set[int]()
        for other in self._others:
            yield list(_around(other, seen, 3))
        for _, module in modules_of(self._model):
            for value in vars(module).values():
                if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
                    yield list(_around(value, seen, 1))
            kind = type(module)
            if id(kind) not in seen and not kind.__module__.startswith("torch."):
                seen.add(id(kind))
                for function in vars(kind).values():
                    if isinstance(function, types.FunctionType):
                        yield list(_around(function, seen, 1))

    def places(self, x: Tensor) -> Place | None:
        """The place at which a tensor is found, if it is at one that is looked at."""
        for path, module in modules_of(self._model):
            words = f"of module {path!r}" if path else "of the model itself"
            for name, value in vars(module).items():
                if name not in _OWN:
                    get = functools.partial(vars(module).get, name)
                    found = _within(value, x, Place(f"attribute {name!r} {words}", get), 2)
                    if found is not None:
                        return found
        for part in self._around():
            for place, value in part:
                found = _within(value, x, place, 2)
                if found is not None:
                    return found
        return None


class _Look:
    def __init__(self, keep: list[Any] | None) -> None:
        self._keep = keep
        self._seen = set[int]()

    def value(self, x: Any, depth: int) -> Any:
        """A value that is equal to that of another object if both are set alike."""
        kind = type(x)
        if kind in _PLAIN:
            return x if x == x else repr(x)  # NaN
        if isinstance(x, Tensor):
            return Tensor  # those that take part are compared one by one
        if kind in (tuple, list, set, frozenset, dict):
            if not depth or len(x) > _MOST:
                return kind, len(x)
            items = x.items() if kind is dict else x
            if kind in (set, frozenset):
                return kind, len(x), frozenset(i for i in x if type(i) in _PLAIN)
            return kind, [self.value(item, depth - 1) for item in items]
        if self._keep is not None:
            self._keep.append(x)
        if id(x) in self._seen or not depth or not _is_plain_object(x):
            return kind, id(x)
        self._seen.add(id(x))
        return kind, id(x), [(n, self.value(v, depth - 2)) for n, v in vars(x).items() if depth > 1]


def _is_plain_object(x: Any) -> bool:
    """Whether the attributes of an object are its settings."""
    skipped = (nn.Module, type, types.FunctionType, types.ModuleType, types.MethodType)
    return hasattr(x, "__dict__") and not isinstance(x, skipped)


def _around(x: Any, seen: set[int], depth: int) -> Iterator[tuple[Place, Any]]:
    """All that a function or an object takes from around it."""
    if id(x) in seen or isinstance(x, (nn.Module, type, types.ModuleType)):
        return
    seen.add(id(x))
    if isinstance(x, functools.partial):
        for i, value in enumerate((*x.args, *x.keywords.values())):
            yield Place(f"argument {i} of a partial function", lambda value=value: value), value
        yield from _around(x.func, seen, depth)
    elif isinstance(x, types.MethodType):
        yield from _around(x.__self__, seen, depth)
        yield from _around(x.__func__, seen, depth)
    elif isinstance(x, types.FunctionType):
        yield from _around_function(x, seen, depth)
    elif hasattr(x, "__dict__"):
        for name, value in vars(x).items():
            words = f"attribute {name!r} of a {type(x).__name__}"
            yield Place(words, functools.partial(vars(x).get, name)), value
            if isinstance(value, types.FunctionType) and depth:
                yield from _around(value, seen, depth - 1)
        call = vars(type(x)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield from _around(call, seen, depth)


def _around_function(x: types.FunctionType, seen: set[int], depth: int) -> Iterator[Any]:
    found = list[tuple[Place, Any]]()
    for name, cell in zip(x.__code__.co_freevars, x.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        place = Place(f"{name!r} around {x.__name__}", lambda cell=cell: cell.cell_contents)
        found.append((place, value))
    for value in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
        found.append((Place(f"a default of {x.__name__}", lambda value=value: value), value))
    for name in _names(x.__code__):
        if name in x.__globals__:
            get = functools.partial(x.__globals__.get, name)
            found.append((Place(f"global {name!r}", get), x.__globals__[name]))
    for place, value in found:
        if isinstance(value, (types.ModuleType, type, nn.Module)):
            continue
        yield place, value
        helper = isinstance(value, types.FunctionType) and value.__module__ == x.__module__
        if helper and depth:
            yield from _around(value, seen, depth - 1)


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Globals that a function and those inside it may name."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


def _within(value: Any, x: Tensor, place: Place, depth: int) -> Place | None:
    """The place of a tensor at another place, or in a container there."""
    if value is x:
        return place
    kind = type(value)
    if kind not in (list, tuple, dict) or not depth or len(value) > _MOST:
        return None
    items = value.items() if kind is dict else enumerate(value)
    for key, item in items:

        def get(key: Any = key) -> Any:
            holder = place.get()
            try:
                return holder[key]
            except (LookupError, TypeError):
                return None

        found = _within(item, x, Place(f"{place.words}[{key!r}]", get), depth - 1)
        if found is not None:
            return found
    return None
