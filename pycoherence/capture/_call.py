"""One call of a torch function that uses parameters, and what its backward pass returns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycoherence.errors import UnsupportedError
from pycoherence.sites import Site

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture

# The one output that is not of `ops.Reduced`: the squared norm of the weighted sum.
_SUM = "sum_sq_norm"

# Activation checkpointing runs the forward pass again in the backward, where no mode is active, and
# takes whatever torch saves there for ours. Nothing else saves a tensor of this shape.
_MARK = torch.empty(0, 7, 0, 7, dtype=torch.uint8)


def saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors that `Call.save` kept.

    Raises:
        UnsupportedError: They are not the ones.
    """
    mark, *tensors = ctx.saved_tensors
    if mark is None or mark.shape != _MARK.shape:
        raise UnsupportedError(
            "activation checkpointing has run a captured layer again where the capture cannot see "
            "it. What to do: leave checkpointing out of the block."
        )
    return tuple(tensors)


@dataclass(frozen=True)
class Slot:
    """A parameter argument of a call that needs a gradient.

    Attributes:
        name: Name of the argument, such as `weight`.
        dtype: Dtype of the parameter, hence of its gradient.
        probes: By output; empty if the tensor is not a tracked parameter.
    """

    name: str
    dtype: torch.dtype
    probes: Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What an autograd Function of this folder needs to know about the call it carries out.

    Attributes:
        capture: The `Capture` that saw the call.
        number: Of this call among those of the capture.
        slots: One for each parameter argument, in the order of the Function's arguments; `None`
            where the argument is absent or needs no gradient.
    """

    capture: "Capture"
    number: int
    slots: tuple[Slot | None, ...]

    @property
    def probes(self) -> tuple[Tensor, ...]:
        """The last arguments of the Function."""
        return tuple(probe for slot in self._used() for probe in slot.probes.values())

    def save(self, ctx: Any, *tensors: Tensor | None) -> None:
        """Keep the call and what its backward needs; `saved` gives the tensors back."""
        ctx.call = self
        ctx.save_for_backward(_MARK, *tensors)

    def needs(self, name: str) -> bool:
        """Whether the parameter argument `name` needs a gradient."""
        return any(slot.name == name for slot in self._used())

    def gradients(self, **sites: Site) -> Iterator[Tensor | None]:
        """Gradients of the parameter arguments, then of the probes.

        Args:
            sites: The site of each parameter argument, by its name.

        Raises:
            RuntimeError: The capture does not know of this backward pass.
        """
        if not self.capture.watched:
            raise RuntimeError(
                "this backward pass runs outside the block of its forward pass, where a gradient "
                "past the capture would not be noticed; call loss.backward() inside the block"
            )
        parameters: list[Tensor | None] = []
        probes: list[Tensor] = []
        for slot in self.slots:
            if slot is None:
                parameters.append(None)
                continue
            gradient, *statistics = _gradients(sites[slot.name], slot)
            parameters.append(gradient)
            probes.extend(statistics)
        yield from parameters
        yield from probes

    def _used(self) -> Iterable[Slot]:
        return (slot for slot in self.slots if slot is not None)


def _gradients(site: Site, slot: Slot) -> Iterator[Tensor]:
    """Of the parameter, then of its probes; all from one reduction."""
    reduced = site.reduce(("weighted_sum", *(name for name in slot.probes if name != _SUM)))
    total = reduced.weighted_sum
    assert total is not None
    yield total.to(slot.dtype)
    for name in slot.probes:
        yield _sq_norm(total) if name == _SUM else getattr(reduced, name)


def _sq_norm(x: Tensor) -> Tensor:
    # By rows, since torch splits the sum of a whole tensor by the number of threads.
    rows = x.flatten(1) if x.dim() > 1 else x
    return torch.linalg.vecdot(rows, rows).sum()
