"""Vectors without a model, in the structures that users have them in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.spec import FLOAT_DTYPES
from pycoherence.sites import is_dtensor

Vectors = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
"""A stack `[n, ...]`, one stack for each name, a vector in each place, or named parts of one."""

ONLY = "vector"
"""The name of vectors that have none."""

_COUNTING = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_EXPECTED = (
    "expected vectors as a tensor [n, ...], a dict of such tensors, a list of n tensors, or a list "
    "of n dicts of tensors such as state dicts"
)


@dataclass(frozen=True)
class Stack:
    """Vectors in named parts, `[n, ...]` each.

    Attributes:
        parts: Those that point somewhere, of floating dtypes.
        counters: Those of whole numbers and bools, which do not.
        names: Names of all parts, in the order of the user's.
        is_named: Whether the user gave names.
        size: `n`.
    """

    parts: dict[str, Tensor]
    counters: dict[str, Tensor]
    names: tuple[str, ...]
    is_named: bool
    size: int

    @classmethod
    def of(cls, vectors: Any) -> "Stack":
        """Take vectors of any structure; those in a list are copied into a stack.

        Raises:
            TypeError: They are none.
            ValueError: They do not fit each other.
        """
        stacked = _stacked(vectors)
        is_named = isinstance(stacked, Mapping)
        found = dict(stacked) if is_named else {ONLY: stacked}
        for name, x in found.items():
            _check_part(name, x)
        found = {name: x.detach() for name, x in found.items()}
        sizes = {name: len(x) for name, x in found.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "expected as many vectors in each part, the first dimension of its tensor, got "
                f"{', '.join(f'{n} in {name}' for name, n in sizes.items())}"
            )
        parts = {name: x for name, x in found.items() if x.is_floating_point()}
        if not parts:
            raise TypeError(f"{_EXPECTED}, got none of a floating dtype in {', '.join(found)}")
        counters = {name: x for name, x in found.items() if name not in parts}
        size = next(iter(sizes.values()))
        return cls(parts, counters, tuple(found), is_named, size)

    @property
    def examples(self) -> dict[str, Tensor]:
        """For each part a tensor like that of one vector, whose numbers do not count."""
        return {n: x.new_empty(()).expand(x.shape[1:]) for n, x in self.parts.items()}

    def restored(self, found: Mapping[str, Tensor]) -> Any:
        """The structure of one vector, with the parts that a rule gave, and counters' medians."""
        values = {name: x.to(self.parts[name].dtype) for name, x in found.items()}
        values |= {name: _lower_median(x) for name, x in self.counters.items()}
        return {name: values[name] for name in self.names} if self.is_named else values[ONLY]


def _stacked(vectors: Any) -> Any:
    """One tensor `[n, ...]`, or one for each name."""
    if isinstance(vectors, (Tensor, Mapping)):
        return vectors
    if not isinstance(vectors, Sequence) or isinstance(vectors, str):
        raise TypeError(f"{_EXPECTED}, got {type(vectors).__name__}")
    if not vectors:
        raise ValueError(f"{_EXPECTED}, got an empty list, which has no shape")
    if all(isinstance(x, Mapping) for x in vectors):
        return _stacked_dicts(vectors)
    return _stacked_tensors("", vectors)


def _stacked_dicts(vectors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    first = vectors[0]
    for i, x in enumerate(vectors):
        if x.keys() != first.keys():
            differing = ", ".join(sorted(map(str, x.keys() ^ first.keys())))
            raise ValueError(
                f"expected the same names in all dicts, got {differing} in only one of numbers 0 "
                f"and {i}"
            )
    return {name: _stacked_tensors(f" of {name}", [x[name] for x in vectors]) for name in first}


def _stacked_tensors(where: str, vectors: Sequence[Any]) -> Tensor:
    first = vectors[0]
    for i, x in enumerate(vectors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{_EXPECTED}, got {type(x).__name__} in number {i}{where}")
        same = (x.shape, x.dtype, x.device) == (first.shape, first.dtype, first.device)
        if not same:
            raise ValueError(
                "expected vectors of one shape, dtype and device, got "
                f"{_words(first)} in number 0{where} and {_words(x)} in number {i}"
            )
    if is_dtensor(first):  # which cannot be stacked in silence
        raise TypeError(_distributed(where))
    return torch.stack([x.detach() for x in vectors])


def _check_part(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_EXPECTED}, got {type(x).__name__} in {name}")
    if is_dtensor(x):
        raise TypeError(_distributed(f" in {name}"))
    known = x.dtype in FLOAT_DTYPES or x.dtype in _COUNTING
    if x.layout != torch.strided or not known:
        raise TypeError(
            "expected dense vectors of float16, bfloat16, float32 or float64, or of whole numbers, "
            f"got {x.dtype} of layout {x.layout} in {name}; to_dense(), torch.view_as_real and "
            "to(torch.float32) give such"
        )
    if not x.dim():
        raise ValueError(f"{_EXPECTED}, got a tensor without dimensions in {name}")


def _distributed(where: str) -> str:
    return f"expected plain tensors, got a DTensor{where}; give what full_tensor() gives"


def _words(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _lower_median(x: Tensor) -> Tensor:
    """At each coordinate, of numbers that have no mean; zero of none."""
    if not len(x):
        return x.new_zeros(x.shape[1:])
    return x.sort(dim=0).values[(len(x) - 1) // 2]


def check_weights(weights: Any, n: int, device: torch.device) -> Tensor:
    """The weights of `n` vectors in float64.

    Raises:
        TypeError: They are no numbers.
        ValueError: They are not one for each, below zero, or all zero.
    """
    expected = f"expected weights to be {n} numbers of zero or more, not all zero"
    try:
        found = torch.as_tensor(weights, dtype=torch.float64, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}, got {weights!r}") from error
    if found.shape != (n,):
        raise ValueError(f"{expected}, got the shape {tuple(found.shape)}")
    if not bool(((found >= 0) & found.isfinite()).all()) or not bool(found.sum() > 0):
        raise ValueError(f"{expected}, got {found.tolist()}")
    return found
