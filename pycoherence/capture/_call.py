"""One call of a torch function that uses parameters, and what its backward pass returns."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycoherence.errors import UnsupportedError
from pycoherence.ops import Reduced
from pycoherence.sites import Site

if TYPE_CHECKING:
    from pycoherence.capture._watch import BackwardWatch


@functools.cache
def _mark() -> Tensor:
    """A tensor that no torch function would save.

    Activation checkpointing runs the forward pass again in the backward, where no mode is active,
    and takes whatever torch saves there for ours.
    """
    return torch.empty(0, 7, 0, 7, dtype=torch.uint8, device="cpu")


def saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors that `Call.save` kept.

    Raises:
        UnsupportedError: They are not the ones.
    """
    mark, *tensors = ctx.saved_tensors
    if mark is None or mark.shape != _mark().shape:
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
        parameter: Name of the tracked parameter; `None` if the tensor is not one.
        shape: Of the parameter, hence of its gradient; so is `dtype`.
        dtype: See `shape`.
        probes: By output; empty if the tensor is not a tracked parameter.
    """

    name: str
    parameter: str | None
    shape: torch.Size
    dtype: torch.dtype
    probes: Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What an autograd Function of this folder needs to know about the call it carries out.

    Attributes:
        watch: What guards its backward pass.
        number: Of this call among those of one capture.
        slots: One for each parameter argument, in the order of the Function's arguments; `None`
            where the argument is absent or needs no gradient.
    """

    watch: "BackwardWatch"
    number: int
    slots: tuple[Slot | None, ...]

    @property
    def used(self) -> list[Slot]:
        """The slots that need a gradient."""
        return [slot for slot in self.slots if slot is not None]

    @property
    def probes(self) -> list[Tensor]:
        """The last arguments of the Function."""
        return [probe for slot in self.used for probe in slot.probes.values()]

    def needs(self, name: str) -> bool:
        """Whether the parameter argument `name` needs a gradient."""
        return any(slot.name == name for slot in self.used)

    def save(self, ctx: Any, *tensors: Tensor | None) -> None:
        """Keep the call and what its backward needs; `saved` gives the tensors back."""
        ctx.call = self
        ctx.save_for_backward(_mark(), *tensors)

    def gradients(self, **sites: Site) -> list[Tensor | None]:
        """Gradients of the parameter arguments, then of the probes.

        Args:
            sites: The site of each parameter argument, by its name.

        Raises:
            RuntimeError: The backward pass is not guarded.
        """
        if not self.watch.running:
            raise RuntimeError(
                "this backward pass was not started by loss.backward() inside the block of its "
                "forward pass, so that a gradient past the capture would not be noticed; call "
                "loss.backward() there"
            )
        parameters: list[Tensor | None] = []
        probes: list[Tensor] = []
        for slot in self.slots:
            if slot is None:
                parameters.append(None)
                continue
            outputs = [name for name in slot.probes if name in Reduced._fields]
            reduced = sites[slot.name].reduce(tuple({"weighted_sum", *outputs}))
            total = reduced.weighted_sum
            assert total is not None
            assert total.shape == slot.shape
            for name in slot.probes:
                probes.append(_sq_norm(total) if name == _SUM else getattr(reduced, name))
            parameters.append(total.to(slot.dtype))
        return [*parameters, *probes]


# The one output that is not of `ops.Reduced`: the squared norm of the weighted sum.
_SUM = "sum_sq_norm"
_ROW = 4096


def _sq_norm(x: Tensor) -> Tensor:
    # By rows of a fixed size, since torch splits a longer sum by the number of threads.
    flat = x.flatten()
    whole = len(flat) - len(flat) % _ROW
    rows, rest = flat[:whole].view(-1, _ROW), flat[whole:]
    total = torch.linalg.vecdot(rest, rest)
    return total + torch.linalg.vecdot(rows, rows).double().sum().to(x.dtype) if whole else total
