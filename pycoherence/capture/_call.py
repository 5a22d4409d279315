"""One call of a torch function that uses parameters, and what its backward pass returns."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycoherence.capture._autocast import without_autocast
from pycoherence.capture._kept import Factors, Kept, row_norms
from pycoherence.capture._plan import Plan
from pycoherence.errors import UnsupportedError
from pycoherence.ops import Reduced
from pycoherence.sites import Site, made_of

if TYPE_CHECKING:
    from pycoherence.capture._watch import BackwardWatch


@functools.cache
def _mark() -> Tensor:
    """A tensor that no torch function would save.

    Activation checkpointing runs the forward pass again in the backward, and would take whatever
    torch saves there for ours if no mode were active.
    """
    return torch.empty(0, 7, 0, 7, dtype=torch.uint8, device="cpu")


def differentiable_once(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Torch's `once_differentiable`, without its cost where no second backward is prepared."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Casts have been made in the forward pass, and what runs here is ours.
        with without_autocast(grads), ctx.call.watch.without_modes():
            return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def saved(ctx: Any) -> tuple[Any, ...]:
    """The tensors that `Call.save` kept.

    Raises:
        UnsupportedError: They are not the ones.
    """
    with torch._C._EnableTorchFunction():
        mark, *tensors = ctx.saved_tensors
    if mark is None or mark.shape != _mark().shape:
        raise UnsupportedError(
            "activation checkpointing has run a captured layer again where the capture cannot see "
            "it. What to do: call loss.backward() inside the block of the forward pass, or leave "
            "checkpointing out of it."
        )
    return tuple(tensors)


class Use(NamedTuple):
    """A tracked parameter that an argument of a call is, or is made of.

    Attributes:
        name: Of the parameter.
        leaf: The parameter.
        probes: By output.
    """

    name: str
    leaf: Tensor
    probes: Mapping[str, Tensor]


class Slot(NamedTuple):
    """A parameter argument of a call that needs a gradient.

    Attributes:
        name: Name of the argument, such as `weight`.
        dtype: Of the argument.
        uses: What it is made of; empty if that is no tracked parameter.
        source: The argument with its graph, if it is not the parameter itself.
    """

    name: str
    dtype: torch.dtype
    uses: tuple[Use, ...] = ()
    source: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The parameters whose gradients are not that of the argument."""
        return [] if self.source is None else [use.leaf for use in self.uses]

    @property
    def probes(self) -> list[Tensor]:
        """Of all uses."""
        return [probe for use in self.uses for probe in use.probes.values()]


class Call(NamedTuple):
    """What an autograd Function of this folder needs to know about the call it carries out.

    Attributes:
        watch: What guards its backward pass.
        number: Of this call among those of one capture.
        slots: One for each parameter argument, in the order of the Function's arguments; `None`
            where the argument is absent or needs no gradient.
        batch_size: `B`.
        group_size: How many rows make one example.
        plan: What to measure.
        want: `plan.want`.
        kept: Where to put what is not the gradient of a probe.
    """

    watch: "BackwardWatch"
    number: int
    slots: tuple[Slot | None, ...]
    batch_size: int
    group_size: int
    plan: Plan
    want: tuple[str, ...]
    kept: Kept

    @property
    def used(self) -> list[Slot]:
        """The slots that need a gradient."""
        return [slot for slot in self.slots if slot is not None]

    @property
    def probes(self) -> list[Tensor]:
        """The last arguments of the Function: parameters that its arguments are made of, probes."""
        return [x for slot in self.used for x in (*slot.leaves, *slot.probes)]

    @property
    def names(self) -> list[str]:
        """The tracked parameters that take part."""
        return [use.name for slot in self.used for use in slot.uses]

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
        if not self.watch.is_running(self.number):
            raise RuntimeError(
                "this backward pass was not started by loss.backward() inside the block of its "
                "forward pass, so that a gradient past the capture would not be noticed; call "
                "loss.backward() there"
            )
        parameters: list[Tensor | None] = []
        last: list[Tensor | None] = []
        for slot in self.slots:
            if slot is None:
                parameters.append(None)
            elif not slot.uses:
                total = sites[slot.name].reduce(("weighted_sum",)).weighted_sum
                parameters.append(_cast(total, slot.dtype))
            else:
                gradients, probes = self._of_slot(slot, sites[slot.name])
                parameters.append(gradients[0] if slot.source is None else None)
                last += probes if slot.source is None else [*gradients, *probes]
        return [*parameters, *last]

    def _of_slot(self, slot: Slot, site: Site) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the parameters of a slot, and of their probes."""
        if self.group_size > 1:
            site = site.grouped(self.group_size)
        leaves, gradients, probes = slot.leaves, list[Tensor | None](), list[Tensor | None]()
        sites = [site] if slot.source is None else made_of(site, slot.source, leaves)
        for use, part in zip(slot.uses, sites, strict=True):
            whole = self.watch.complete(use.name, part)
            if whole is None:  # the last of several uses gives all
                gradients.append(None)
                probes += [None] * len(use.probes)
                continue
            reduced = self._measure(use.name, whole)
            gradients.append(_cast(self._gradient(use.name, whole, reduced), use.leaf.dtype))
            probes += [getattr(reduced, output) for output in use.probes]
        return gradients, probes

    def _gradient(self, name: str, site: Site, reduced: Reduced) -> Tensor | None:
        order = self.plan.order
        if order is None:
            return reduced.weighted_sum if self.plan.gradients else None
        # A mean of the examples' shares: of a mean, their mean is B of it, and so it is of a sum.
        gradient = site.order(order.rule, order.k, order.drop) * self.batch_size
        if self.watch.keeping:
            count = gradient.count_nonzero() if order.count else None
            self.kept.ordered[name] = count
        return gradient

    def _measure(self, name: str, site: Site) -> Reduced:
        want, plan = self.want, self.plan
        reduced = site.reduce(want, direction=plan.directions.get(name)) if want else Reduced()
        if self.watch.keeping:
            if plan.factors:
                self.kept.factors[name] = Factors.of(site)
            if plan.sum_norms and reduced.weighted_sum is not None:
                self.kept.sum_norms[name] = row_norms(reduced.weighted_sum)
        return reduced


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)
