"""Answers of rules about regular owners, by all that each depends on.

A step calls the same functions as the step before it, with tensors of the same shapes and owners,
so that its rules are asked once and not again. Answers hold no tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.facts import Facts, Regular
from pycoherence.capture.rules import ELEMENTWISE, MOVEMENT

Key = tuple[Any, ...]

_LIMIT = 1 << 14

_answers: dict[Key, tuple[Facts, ...]] = {}

_PLAIN = frozenset(
    (bool, float, type(None), EllipsisType, torch.dtype, torch.memory_format, torch.layout)
)


def key_of(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    results: Iterable[Tensor],
    known: Mapping[int, Facts],
    kind: int,
) -> Key | None:
    """All that the owners of a call's results depend on; `None` if that is not this alone.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        results: The tensors it returned; their sizes may depend on numbers.
        known: The facts of the tensors of examples among the arguments, by `id`.
        kind: That of its rule.
    """
    parts: list[Any] = [func, len(args)]
    # Numbers in the tensor that a function takes first matter for nothing but sizes.
    if not _add(args[:1], parts, known, kind, first=True) or not _add(args[1:], parts, known, kind):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _add((value,), parts, known, kind):
            return None
    parts += [x.shape for x in results]
    return tuple(parts)


def _add(
    values: Iterable[Any],
    parts: list[Any],
    known: Mapping[int, Facts],
    kind: int,
    *,
    first: bool = False,
) -> bool:
    """Add what matters of some arguments; returns whether that is all."""
    for value in values:
        of = type(value)
        if kind == ELEMENTWISE and (of is float or of is int):
            parts.append(of)  # such as a rate that is another in each step
        elif of is int or of is str:
            parts.append(value)
        elif isinstance(value, Tensor):
            facts = known.get(id(value))
            if not (first or value.is_floating_point()) and _matter(value, facts, kind):
                return False
            if facts is None:
                parts.append(value.shape)
            elif type(facts.owner) is Regular:
                parts += (value.shape, facts.owner, facts.soft)
            else:
                return False
        elif of in _PLAIN:
            parts.append((of, value))  # since True and 1.0 are equal to 1
        elif of is slice:
            parts.append(slice)
            if not _add((value.start, value.stop, value.step), parts, known, MOVEMENT):
                return False
        elif isinstance(value, (tuple, list)):
            parts.append((list if isinstance(value, list) else tuple, len(value)))
            if not _add(value, parts, known, kind, first=first):
                return False
        else:
            return False
    return True


def _matter(x: Tensor, facts: Facts | None, kind: int) -> bool:
    """Whether the numbers in a tensor that is not floating may say where elements are.

    A movement takes places and masks. Torch also takes a tensor of constants, or of one number, for
    a dimension or a size. Masks and classes of examples are neither.
    """
    if kind == ELEMENTWISE:
        return False
    constant = facts is None and x.dtype != torch.bool
    return kind == MOVEMENT or constant or not x.dim()


def recall(key: Key) -> tuple[Facts, ...] | None:
    """The facts of the results of such a call, if one has been seen."""
    try:
        return _answers.get(key)
    except TypeError:
        return None  # a size that stands for several


def remember(key: Key, facts: tuple[Facts, ...]) -> None:
    """Keep the facts of the results of a call."""
    if len(_answers) >= _LIMIT:
        _answers.clear()
    with suppress(TypeError):
        _answers[key] = facts
