"""Tensors whose second dimension is the batch, as in layers with `batch_first=False`."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycoherence.capture._folds import FOLDING, ROWS_STAY
from pycoherence.capture._origins import tensors
from pycoherence.capture._registry import Handler
from pycoherence.capture._rows import Refuse

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture

FIRST, SECOND = 0, 1

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_PARTS = ("linear1", "linear2", "norm1", "norm2", "norm3")

_SWAPS = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes}
_PERMUTES = {Tensor.permute, torch.permute}

# What computes each [i, j] of its result from the [i, j] of its arguments.
_STAYS = {
    *(ROWS_STAY - {F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.instance_norm, F.group_norm}),
    *(torch.sub, torch.where, Tensor.masked_fill, Tensor.add_, Tensor.mul_, Tensor.sub_),
    *(Tensor.__iadd__, Tensor.__imul__, Tensor.__isub__, Tensor.detach, F.embedding, F.relu_),
    *(F.dropout1d, F.alpha_dropout, F.celu, F.selu, F.glu, F.logsigmoid, F.relu, torch.relu_),
}


class Layouts:
    """Remembers where the batch is in tensors, as far as layers have told.

    Args:
        model: Its Transformer layers with `batch_first=False` take everything time first.

    Attributes:
        active: Whether there is a tensor or a layer with the batch second, as far as is known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
        self._parameters = {
            id(p)
            for layer in layers
            if not layer.self_attn.batch_first
            for part in _PARTS
            for p in getattr(layer, part, nn.Identity()).parameters()
        }
        self.active = any(getattr(m, "batch_first", True) is False for m in model.modules())

    def of(self, x: Any) -> int | None:
        """Which dimension of a tensor is the batch, if that is known."""
        ref, place = self._known.get(id(x), (None, None))
        return place if ref is not None and ref() is x else None

    def note(self, found: Any, place: int) -> None:
        """Remember where the batch is in tensors."""
        self.active |= place == SECOND
        for x in tensors(found):
            self._known[id(x)] = weakref.ref(x), place

    def like(self, x: Tensor, other: Tensor) -> None:
        """Take one tensor's place for that of another."""
        place = self.of(other)
        if place is not None:
            self.note(x, place)

    def expect(self, x: Tensor, place: int, refuse: Refuse) -> None:
        """Refuse a tensor that was said to have the batch elsewhere.

        Raises:
            UnsupportedError: It was.
        """
        if self.of(x) == 1 - place:
            words = ("first", "second")
            refuse(
                f"it takes the {words[place]} dimension of its input {tuple(x.shape)} for the "
                f"batch, but a function before it took the {words[1 - place]}",
                "keep the batch first in all layers (batch_first=True); or give the layers before "
                "it inputs [B, T, ...], and transpose(0, 1) what they return",
            )

    def is_second(self, x: Tensor, parameters: Any, refuse: Refuse) -> bool:
        """Whether the batch is the second dimension of an input of a function of parameters."""
        if any(id(p) in self._parameters for p in tensors(parameters)):
            self.expect(x, SECOND, refuse)
            return True
        return self.of(x) == SECOND

    def follow(self, func: Callable[..., Any], args: Sequence[Any], result: Any) -> bool:
        """Look at a call of a torch function, and tell whether the batch was second."""
        places = [(x, place) for x in tensors(args) if (place := self.of(x)) is not None]
        if places and isinstance(result, Tensor) and self.of(result) is None:
            moved = _moved(func, args, places, result)
            if moved in (FIRST, SECOND) and result.dim() > moved:
                self.note(result, moved)
        return any(place == SECOND for _, place in places)


def _moved(
    func: Callable[..., Any],
    args: Sequence[Any],
    places: list[tuple[Tensor, int]],
    result: Tensor,
) -> int | None:
    """Which dimension of the result is the batch, from those of the arguments; `None` unknown."""
    x, place = places[0]
    if func in _SWAPS or func in _PERMUTES:
        order = _order(func, x, args[1:])
        return None if order is None else order.index(place)
    if func is Tensor.__getitem__:
        return _kept(args[1], place)
    if func is Tensor.unsqueeze or func is torch.unsqueeze:
        return place + (args[1] % result.dim() <= place) if len(args) > 1 else None
    if func is Tensor.squeeze or func is torch.squeeze:
        return _squeezed(x, place, args[1:])
    if func in _STAYS:
        return next((p for y, p in places[::-1] if _stays(func, y, p, result)), None)
    return None


def either_way(handler: Handler) -> Handler:
    """A handler whose input may have the batch second: its first argument, and its result."""

    @functools.wraps(handler)
    def handle(capture: "Capture", input: Tensor, *args: Any, **kwargs: Any) -> Any:
        layouts = capture.layouts
        if not layouts.active:
            return handler(capture, input, *args, **kwargs)
        if not layouts.is_second(input, (args, kwargs), capture.refuse):
            found = handler(capture, input, *args, **kwargs)
            layouts.note(found, FIRST)
            return found
        sizes = [x for x in (*args, *kwargs.values()) if isinstance(x, (tuple, list))]
        if any(len(size) >= input.dim() - 1 for size in sizes):
            capture.refuse(
                f"it normalises its input {tuple(input.shape)} over the batch, which is the second "
                "dimension",
                "give it an input [B, ...]",
            )
        found = handler(capture, input.transpose(0, 1), *args, **kwargs)
        if found is not NotImplemented:
            found = found.transpose(0, 1)
            layouts.note(found, SECOND)
        return found

    return handle


def _order(func: Callable[..., Any], x: Tensor, args: Sequence[Any]) -> list[int] | None:
    """Which dimension of `x` each one of the result is."""
    flat = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if not all(isinstance(d, int) for d in flat) or not flat:
        return None
    dims = [d % x.dim() for d in flat]
    if func in _PERMUTES:
        return dims
    order = list(range(x.dim()))
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return order


def _kept(index: Any, place: int) -> int | None:
    """Where the batch is after indexing, if it is left whole."""
    indices = index if isinstance(index, tuple) else (index,)
    ahead = indices[:place]
    whole = len(indices) <= place or indices[place] == slice(None)
    if not whole or not all(isinstance(i, (int, slice)) for i in ahead):
        return None
    return place - sum(isinstance(i, int) for i in ahead)


def _squeezed(x: Tensor, place: int, dims: Sequence[Any]) -> int | None:
    """Where the batch is without one dimension of size one."""
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    dim = dims[0] % x.dim()
    if x.shape[dim] != 1:
        return place
    return None if dim == place else place - (dim < place)


def _stays(func: Callable[..., Any], x: Tensor, place: int, result: Tensor) -> bool:
    if result.dim() <= place or x.dim() <= place or x.shape[place] != result.shape[place]:
        return False
    if func in FOLDING:
        return x.shape[: place + 1] == result.shape[: place + 1]
    return result.dim() == x.dim()
