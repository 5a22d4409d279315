"""Tensors that come from outside of a block: its batch, and what the model holds."""

import sys
import weakref
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from pycoherence.capture.facts import (
    EXAMPLES,
    IS_CONSTANT,
    Facts,
    Ids,
    Lost,
    Owner,
    Regular,
    tensors,
)
from pycoherence.capture.model import modules_of
from pycoherence.capture.torch_internals import has_captured, is_in_vmap
from pycoherence.sites import is_dtensor

NESTED, SPARSE, VMAP = "a nested tensor", "a sparse tensor", "torch.vmap"
"""Kinds of tensors in which examples cannot be followed."""

_CALL = nn.Module._call_impl.__code__

_constants: dict[int, "weakref.ref[Tensor]"] = {}
"""Tensors that blocks made without examples and left alive, such as a table of positions."""


class Outside:
    """Tells what a tensor is that no function of the block has made.

    Args:
        model: Its parameters, buffers and plain attributes are the same for all examples.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: set[int] | None = None

    def facts(self, x: Tensor, count: int | None, batch_first: bool) -> Facts:
        """The facts of a tensor; `batch_first` says where the batch of the pass has been so far."""
        if isinstance(x, nn.Parameter) or self._is_held(x) or is_remembered(x):
            return IS_CONSTANT
        if x.is_nested or x.layout != torch.strided:
            return Facts(EXAMPLES, Lost(kind_of(x), mixed=False, count=count or 1))
        if is_in_vmap(x):
            return Facts(EXAMPLES, Lost(VMAP, mixed=False, count=count or 1))
        if not x.dim():
            return IS_CONSTANT
        if x.grad_fn is not None:
            # A function that torch does not show, such as a custom autograd.Function, made it.
            if not has_captured(x):
                return IS_CONSTANT  # of parameters: that it bypasses the capture will be refused
            if count is not None and (x.shape[0] != count or not batch_first):
                return Facts(EXAMPLES, Lost("a function torch does not show", False, count))
            return Facts(EXAMPLES, _first(x), soft=int(count is None))
        if is_dtensor(x) and not batch_first:
            # Made where no mode sees it, perhaps of a tensor that has its batch elsewhere.
            lost = Lost("distributing it (DTensor)", mixed=False, count=count or x.shape[0])
            return Facts(EXAMPLES, lost)
        return self.by_first_dimension(x, 1)

    def by_first_dimension(self, x: Tensor, soft: int) -> Facts:
        """The default: the first dimension is the batch, until the tensor meets what is certain."""
        return Facts(EXAMPLES, _first(x), soft=soft)

    def rerooted(self, x: Tensor, owner: Owner) -> Owner:
        """Take each row of data that was picked before the model ran for an example.

        A batch that was only put in another order keeps whose rows they are, and so does what the
        model itself picks.
        """
        if not x.dim():
            return owner
        if isinstance(owner, Regular) and x.shape[0]:
            return owner
        if self.arguments() is not None:
            return owner
        if isinstance(owner, (Lost, Regular)):
            return _first(x)
        varying = [d for d, n in enumerate(owner.ids.shape) if n > 1]
        if len(varying) == 1:
            ids = owner.ids.flatten()
            if len(ids) == owner.count and len(ids.unique()) == owner.count:
                return owner
        return _first(x) if x.dim() else owner

    def remember(self, constants: Iterable[Tensor]) -> None:
        """Take what a block made without examples for constants in later ones too."""
        for x in constants:
            key = id(x)
            if key not in _constants or _constants[key]() is not x:
                _constants[key] = weakref.ref(x, lambda _, key=key: _constants.pop(key, None))

    def arguments(self) -> list[Tensor] | None:
        """The tensors that the model was called with, if it is running; seen on the stack."""
        found: list[Tensor] | None = None
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._model:
                values = (frame.f_locals.get("args"), frame.f_locals.get("kwargs"))
                found = tensors(values)
            frame = frame.f_back
        return found

    def _is_held(self, x: Tensor) -> bool:
        if self._held is None:
            self._held = _held_by(self._model)
        return id(x) in self._held


def kind_of(x: Tensor) -> str:
    """The kind of a tensor that is not dense, for messages."""
    return NESTED if x.is_nested else SPARSE


def is_remembered(x: Tensor) -> bool:
    """Whether an earlier block has made a tensor without examples."""
    found = _constants.get(id(x))
    return found is not None and found() is x


def _first(x: Tensor) -> Owner:
    return Regular(max(1, prod(x.shape[1:])), x.shape[0])


def _held_by(model: nn.Module) -> set[int]:
    """The `id` of each parameter, buffer and plain attribute of a model, and of what these hold."""
    found: set[int] = set()
    for _, module in modules_of(model):
        found.update(map(id, module._parameters.values()), map(id, module._buffers.values()))
        # To ask whether something is a tensor takes long, and few attributes can hold one.
        values = [x for name, x in vars(module).items() if name not in _OWN]
        for value in values:
            kind = type(value)
            if kind in _NUMBERS:
                continue
            if kind in (list, tuple, dict):
                items = value.values() if kind is dict else value
                found.update([id(x) for x in items if isinstance(x, Tensor)])
            elif isinstance(value, Tensor):
                found.add(id(value))
    return found


_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has; none is a tensor."""

_NUMBERS = frozenset((bool, int, float, str, type(None)))


__all__ = ["Ids", "Outside"]
