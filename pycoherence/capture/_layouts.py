"""Tensors whose second dimension is the batch, as in layers with `batch_first=False`."""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pycoherence.capture._moves import FIRST, LOST, SECOND, is_lost, moved, of_sequences
from pycoherence.capture._origins import tensors
from pycoherence.capture._registry import Handler
from pycoherence.capture._rows import Refuse

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_PARTS = ("linear1", "linear2", "norm1", "norm2", "norm3")


class Layouts:
    """Remembers where the batch is in tensors, as far as layers have told.

    Args:
        model: Its Transformer layers with `batch_first=False` take everything time first.
        modules: All of its modules.

    Attributes:
        active: Whether there is a tensor or a layer with the batch second, as far as is known.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._mixed = any(m.__dict__.get("batch_first", True) is False for m in modules)
        self._names: set[str] = _time_first(model, modules) if self._mixed else set()
        self.active = self._mixed

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
        known = self.of(x)
        if known is None or known == place:
            return
        words = ("first", "second")
        takes = f"it takes the {words[place]} dimension of its input {tuple(x.shape)} for the batch"
        lost = "but where a function before it has put the batch is not known"
        otherwise = f"but a function before it took the {words[1 - place]}"
        refuse(
            f"{takes}, {lost if known == LOST else otherwise}",
            "keep the batch first in all layers (batch_first=True); or give the layers before "
            "it inputs [B, T, ...], and transpose(0, 1) what they return",
        )

    def is_second(self, x: Tensor, names: Iterable[str], refuse: Refuse) -> bool:
        """Whether the batch is the second dimension of what meets these parameters."""
        if self._names.isdisjoint(names):
            return self.of(x) == SECOND
        self.expect(x, SECOND, refuse)
        return True

    def follow(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        results: Any,
    ) -> bool:
        """Look at a call of a torch function, and tell whether the batch was second."""
        for result, place in zip(tensors(results), of_sequences(func, args), strict=False):
            self.note(result, place)
        places = [(x, place) for x in tensors(args) if (place := self.of(x)) is not None]
        for result in tensors(results) if places else ():
            if self.of(result) is None:
                to = moved(func, args, kwargs, places, result)
                if to is None and any(self._is_lost(x, place, result) for x, place in places):
                    to = LOST
                if to is not None and result.dim() > to:
                    self.note(result, to)
        return any(place == SECOND for _, place in places)

    def _is_lost(self, x: Tensor, place: int, result: Tensor) -> bool:
        # Where all layers have the batch first, it is first.
        return (self._mixed or place != FIRST) and is_lost(x, place, result)


def _time_first(model: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    """The parameters of Transformer layers that meet everything with the time first."""
    parts = {
        id(p)
        for layer in modules
        if isinstance(layer, _LAYERS) and not getattr(layer.self_attn, "batch_first", True)
        for part in _PARTS
        for p in getattr(layer, part, nn.Identity()).parameters()
    }
    return {name for name, p in model.named_parameters() if id(p) in parts}


def either_way(handler: Handler) -> Handler:
    """A handler whose input may have the batch second: its first argument, and its result."""

    @functools.wraps(handler)
    def handle(capture: "Capture", input: Tensor, *args: Any, **kwargs: Any) -> Any:
        layouts = capture.layouts
        if not layouts.active:
            return handler(capture, input, *args, **kwargs)
        names = [name for p in tensors((args, kwargs)) for name in capture.names_of(p)]
        if not layouts.is_second(input, names, capture.refuse):
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
            # As torch lays it out, so that dropout behind it draws the same numbers.
            found = found.transpose(0, 1).contiguous()
            layouts.note(found, SECOND)
        return found

    return handle
