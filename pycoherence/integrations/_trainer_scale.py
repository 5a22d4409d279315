"""The scale of the losses of a `Trainer`, which it reads from their graph."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer

from pycoherence.errors import UnsupportedError
from pycoherence.integrations._losses import (
    Average,
    GradientEdge,
    averages,
    batch_size,
    depends_on_others,
    derivatives,
    edge_of,
    only_sum,
    replaced,
)
from pycoherence.record import LossReduction

_SAY = (
    "say what g_b is: PerExampleCallback(..., loss_reduction='mean') makes it B times the part "
    "that example b has in the loss, 'sum' that part itself"
)

Source = Literal["function", "model", "compute_loss"]
"""The maker of a loss."""

_SOURCES: tuple[Source, ...] = ("function", "model", "compute_loss")
"""Each is scaled after those before it."""


class TrainerScale:
    """Finds by which number a loss, as a sum over examples, is multiplied; a `loss_scale`.

    The number of items takes part in the graph during the pass, so that it shows whether the loss
    was divided by it.

    Attributes:
        items: The number of items, for `training_step`.
    """

    def __init__(
        self,
        trainer: Trainer,
        inputs: Mapping[str, Any],
        items: Tensor | int | None,
        loss_reduction: LossReduction | None,
        group_size: int,
    ) -> None:
        self._trainer, self._loss_reduction = trainer, loss_reduction
        self._labels, self._group_size = inputs.get("labels"), group_size
        self._losses: list[tuple[Source, _Loss]] = []
        self.items: Tensor | None = None
        if items is not None:
            known = torch.as_tensor(items).detach()
            known = known if known.is_floating_point() else known.float()
            self.items = known.clone().requires_grad_()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """See the losses that are computed on the way to that of `training_step`."""
        with ExitStack() as stack:
            stack.callback(self._losses.clear)  # who holds a loss holds its graph
            # A wrapper may pass what the model gives through a function of its own.
            inner = self._trainer.accelerator.unwrap_model(model)
            handle = inner.register_forward_hook(lambda _, __, found: self._see("model", found))
            stack.callback(handle.remove)
            for name in ("compute_loss_func", "label_smoother"):
                if getattr(self._trainer, name, None) is not None:
                    self._watch(stack, name, "function")
            self._watch(stack, "compute_loss", "compute_loss")
            yield

    def _watch(self, stack: ExitStack, name: str, source: Source) -> None:
        function = getattr(self._trainer, name)

        def seen(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            self._see(source, found)
            return found

        stack.enter_context(replaced(self._trainer, name, seen))

    def _see(self, source: Source, found: Any) -> None:
        if isinstance(found, Mapping):
            found = found.get("loss")
        elif isinstance(found, (tuple, list)):
            found = found[0] if found else None
        if isinstance(found, Tensor) and found.requires_grad and found.numel() == 1:
            # The Trainer multiplies it in place.
            self._losses.append((source, _Loss(edge_of(found), found.detach().clone())))

    def __call__(self, root: Tensor) -> float:
        """The number, found from what `backward()` is called on.

        Raises:
            UnsupportedError: It cannot be known.
        """
        items = [] if self.items is None else [edge_of(self.items)]
        factors = derivatives(root, [*(loss.edge for _, loss in self._losses), *items])
        by_items = factors.pop() if items else None
        source, loss, factor = self._loss_of(root, factors)
        rows = self._rows()
        if self._loss_reduction is not None:
            return _scale(factor, batch_size() if self._loss_reduction == "mean" else 1)
        if by_items is not None and source == "compute_loss" and self._is_average_of_all():
            return self._scale_of_sum(root, loss.edge)
        if by_items is not None:
            assert self.items is not None
            if not loss.is_divided_by(self.items, by_items / factor):
                self._refuse("has terms that num_items_in_batch does not divide")
            return _scale(factor, self.items.item())
        found = averages(loss.edge)
        if found is not None:
            divisors = {self._divisor(one, len(found) == 1) for one in found}
            if len(divisors) > 1:
                self._refuse("is a mean of several means")
            (divisor,) = divisors
            if divisor is None:
                self._refuse(
                    f"is a mean of {found[0].terms} terms, which are neither the {rows} rows of "
                    "the batch nor its labels"
                )
            return _scale(factor, divisor)
        if self.items is None and self._group_size == 1 and self._has_labels_of(rows):
            return _scale(factor, rows)  # the Trainer takes it for a mean as well
        self._refuse(
            "shows neither that it was divided by num_items_in_batch nor that it is a mean"
        )

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedError(
            f"the loss {why}, so that its scale would be a guess. What to do: {_SAY}."
        )

    def _loss_of(
        self, root: Tensor, factors: Sequence[float | None]
    ) -> tuple[Source, "_Loss", float]:
        """The first loss that the whole is a multiple of, and by how much."""
        beside = False
        for source in _SOURCES:
            reached: list[tuple[Source, _Loss, float]] = [
                (by, loss, factor)
                for (by, loss), factor in zip(self._losses, factors, strict=True)
                if by == source and factor is not None
            ]
            if len(reached) > 1:
                raise UnsupportedError(
                    f"the loss is made of {len(reached)} losses, of as many calls of the model or "
                    "the loss function in one training_step. What to do: compute them from one "
                    "call, or measure with pc.GradientMonitor in a training_step of your own."
                )
            if not reached:
                continue
            # By how much the Trainer has multiplied one part of several is not known.
            known = not beside or self._loss_reduction or not self._is_average_of_all()
            if known and not depends_on_others(root, reached[0][1].edge, self.items):
                return reached[0]
            beside = True
        if beside:
            self._refuse("has other terms beside that of the model or the loss function")
        raise UnsupportedError(
            "backward() was called on a loss that is not from compute_loss, so that its scale is "
            "not known. What to do: return the loss from compute_loss, or measure with "
            "pc.GradientMonitor in a training_step of your own."
        )

    def _rows(self) -> int:
        return batch_size() * self._group_size

    def _divisor(self, one: Average, is_all: bool) -> float | None:
        """The number by which an average divides the sum over rows or tokens, if it is known."""
        rows, labels = self._rows(), self._labels
        if one.weight is not None and (is_all or one.terms != rows):
            return one.weight
        if one.terms in (rows, batch_size()):
            return one.terms
        if isinstance(labels, Tensor) and not labels.is_floating_point():
            return one.terms if one.terms > rows and one.terms in _counts(labels) else None
        by_row = one.by_element and one.shape[:1] == (rows,)
        if isinstance(labels, Tensor):
            by_row = by_row or (labels.shape[:1] == (rows,) and labels.numel() == one.terms)
        return rows if by_row else None

    def _is_average_of_all(self) -> bool:
        """Whether a loss that is divided by the number of items may be multiplied in turn."""
        trainer = self._trainer
        several = trainer.accelerator.num_processes > 1
        return several and trainer.args.average_tokens_across_devices

    def _scale_of_sum(self, root: Tensor, loss: GradientEdge) -> float:
        """The scale of a loss that `compute_loss` may have multiplied itself."""
        total = only_sum(loss)
        factor = None if total is None else derivatives(root, [total])[0]
        if factor is None:
            raise UnsupportedError(
                "this compute_loss divides a loss of its own by num_items_in_batch, which is that "
                "of all processes with average_tokens_across_devices, and does not show whether "
                "it is multiplied by their number. What to do: give TrainingArguments("
                f"average_tokens_across_devices=False), or {_SAY}."
            )
        return _scale(factor, 1)

    def _has_labels_of(self, rows: int) -> bool:
        """Whether each row has one label, or several numbers."""
        labels = self._labels
        if not isinstance(labels, Tensor):
            return False
        return labels.numel() == rows or (labels.is_floating_point() and len(labels) == rows)


class _Loss(NamedTuple):
    """A loss that was computed on the way.

    Attributes:
        edge: Its place in the graph.
        value: Its value.
    """

    edge: GradientEdge
    value: Tensor

    def is_divided_by(self, number: Tensor, derivative: float) -> bool:
        """Whether all of it is divided by a number, by which it has this derivative.

        By Euler, a function is a constant over x if its derivative by x, times x, is its negative.
        """
        value, other = self.value.item(), -number.item() * derivative
        if not math.isfinite(value):
            return True  # and so are the gradients
        precision = 16 * torch.finfo(self.value.dtype).eps
        return abs(value - other) <= precision * max(abs(value), abs(other))


def _counts(labels: Tensor) -> set[int]:
    """How many tokens a mean over labels may be of: all, those that follow others, or count."""
    after = labels[..., 1:]
    counted = [int((some != -100).sum()) for some in (labels, after)]
    return {labels.numel(), after.numel(), *counted}


def _scale(factor: float, divisor: float) -> float:
    """The scale of a sum that is divided by `divisor` and multiplied by `factor`."""
    if divisor <= 0:
        raise ValueError(
            f"expected labels that count, got {divisor:g} in all; leave out examples whose labels "
            "are all -100"
        )
    if not 0 < factor < math.inf:
        raise ValueError(
            f"expected the loss to be multiplied by a positive number, got {factor}; let it be "
            "what training makes small"
        )
    return factor / divisor
