"""What rules have answered about regular owners, by all that an answer depends on.

A step calls the same functions as the step before it, with tensors of the same shapes and owners,
so that its rules are asked once and not again. Answers hold no tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.facts import Facts, Regular

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
    known: Mapping[int, Facts],
    *,
    moves: bool,
) -> Key | None:
    """All that the owners of a call's results depend on; `None` if that is not this alone.

    Args:
        func: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        known: The facts of the tensors of examples among them, by `id`.
        moves: Whether it is a movement, for which integers may say where elements are.
    """
    parts: list[Any] = [func, len(args)]
    if args and not _add(args[:1], parts, known, indices=False):
        return None
    if not _add(args[1:], parts, known, indices=moves):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _add((value,), parts, known, indices=moves):
            return None
    return tuple(parts)


def _add(
    values: Iterable[Any], parts: list[Any], known: Mapping[int, Facts], *, indices: bool
) -> bool:
    """Add what matters of some arguments; returns whether that is all."""
    for value in values:
        kind = type(value)
        if kind is int or kind is str:
            parts.append(value)
        elif isinstance(value, Tensor):
            if indices and not value.is_floating_point():
                return False
            facts = known.get(id(value))
            if facts is None:
                parts.append(value.shape)  # a constant whose numbers do not matter
            elif type(facts.owner) is Regular:
                parts += (value.shape, facts.owner, facts.soft)
            else:
                return False
        elif kind in _PLAIN:
            parts.append((kind, value))  # since True and 1.0 are equal to 1
        elif kind is slice:
            parts.append(slice)
            if not _add((value.start, value.stop, value.step), parts, known, indices=True):
                return False
        elif isinstance(value, (tuple, list)):
            parts.append((list if isinstance(value, list) else tuple, len(value)))
            if not _add(value, parts, known, indices=indices):
                return False
        else:
            return False
    return True


def recall(key: Key) -> tuple[Facts, ...] | None:
    """The facts of the results of such a call, if one has been seen."""
    return _answers.get(key)


def remember(key: Key, facts: tuple[Facts, ...]) -> None:
    """Keep the facts of the results of a call."""
    if len(_answers) >= _LIMIT:
        _answers.clear()
    _answers[key] = facts
