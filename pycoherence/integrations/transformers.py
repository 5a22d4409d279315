"""Per-example gradients in the `Trainer` of transformers."""

import heapq
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames, ParallelMode

from pycoherence.capture import OnUnsupported, check_grouping
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
from pycoherence.integrations.accelerate import check_accelerator, check_version, refuse
from pycoherence.monitor import GradientMonitor
from pycoherence.record import (
    LossReduction,
    Record,
    check_loss_reduction,
    check_on_unsupported,
)
from pycoherence.robust import Report, Rule, WeightRule, check_count
from pycoherence.statistics import SqNorms, Statistic

__all__ = ["KeepIndex", "PerExampleCallback", "PerExampleTrainer", "Surprise"]

_SAY = (
    "say what g_b is: PerExampleCallback(..., loss_reduction='mean') makes it B times the part "
    "that example b has in the loss, 'sum' that part itself"
)


class Surprise(NamedTuple):
    """An example with a large gradient.

    Attributes:
        index: Its index in the dataset.
        norm: The norm of its gradient.
        step: The optimizer step, counted from 1, as the Trainer counts them.
    """

    index: int
    norm: float
    step: int


class PerExampleCallback(TrainerCallback):
    r"""Measures the per-example gradients of each step of a `transformers.Trainer`.

    .. math:: g_b = \sum_t \nabla_w \ell_{bt} \ \text{(tokens)}
        \qquad g_b = \nabla_w \ell_b \ \text{(one loss each)}

    over the targets t of example b that count, in whatever way the Trainer scales the loss: by
    `num_items_in_batch`, steps of accumulation, processes and a `GradScaler`. It divides by the
    number that it reads from the graph that `backward()` starts from.

    A Trainer, or a subclass of it such as those of TRL, takes it in `callbacks`. The scalars of
    `Record.scalars`, pooled over the micro-batches of the last measured step, go with the Trainer's
    own logs to all that `report_to` names. Each process measures and logs its own examples.

    Args:
        statistics: Such as `pc.SqNorms()`, which is taken if none is given.
        rule: A rule for `pycoherence.aggregate`, such as `pc.NormClip(1.0)`, which fills `.grad` at
            each micro-batch; `None` for the ordinary gradient.
        every: Measure each `every`-th optimizer step.
        top: How many examples to list in `surprising`. It needs `SqNorms`, and batches with a
            column of indices, which `KeepIndex` keeps.
        index: The name of that column. It is taken out of the batch before the model gets it.
        loss_reduction: `None` to find out how the loss joins those of the examples. Losses that do
            not show it, which is an error then, need `"mean"` or `"sum"`, as in
            `pycoherence.collect`: `g_b` is that of the loss that the model, `compute_loss_func` or
            `compute_loss` returns.
        group_size: How many consecutive rows make one example, as in `pycoherence.collect`. Its
            gradient is the sum of those of its rows, unless the loss is a mean over groups.
        on_unsupported: The treatment of a parameter that is used in a way that is not known, as in
            `pycoherence.collect`.

    Raises:
        ValueError: `top` without `SqNorms`, numbers that are too small, a rule with
            `expected_batch_size`, since the Trainer divides the sum itself; from a step: the batch
            has no indices. See `pycoherence.GradientMonitor` also.
        UnsupportedError: From `train()`: transformers is older than 5.12; the Trainer compiles the
            model, or runs it by FSDP1, DeepSpeed, `nn.DataParallel` or in slices of the
            sequence; its optimizer steps inside `backward()`; a rule over whole examples meets
            `DistributedDataParallel`. From a step: the loss does not show how it is scaled.

    Cost: That of `pycoherence.collect`, or `pycoherence.aggregate` with a rule. Scalars, and the
    scale of the loss, wait for the device once in a micro-batch.

    Example:
        >>> import pycoherence as pc
        >>> from pycoherence.integrations.transformers import PerExampleCallback
        >>> callback = PerExampleCallback(pc.SqNorms(), every=10)
        >>> callback.records  # of the micro-batches of the last measured step
        []
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        *statistics: Statistic,
        rule: Rule | None = None,
        every: int = 1,
        top: int = 0,
        index: str = "index",
        loss_reduction: LossReduction | None = None,
        group_size: int = 1,
        on_unsupported: OnUnsupported = "auto",
    ) -> None:
        self._statistics = statistics or (SqNorms(),)
        self._every = check_count("every", every, 1)
        self._top = check_count("top", top, 0)
        if top and not any(isinstance(one, SqNorms) for one in self._statistics):
            raise ValueError("expected pc.SqNorms() among the statistics, which top= sorts by")
        if loss_reduction is not None:
            check_loss_reduction(loss_reduction)
        if getattr(rule, "expected_batch_size", None) is not None:
            raise ValueError(
                "expected a rule without expected_batch_size, as the Trainer divides the sum over "
                f"examples itself, got {rule!r}; leave it out, or divide by it in a loop of your "
                "own with pc.aggregate"
            )
        self._rule, self._index = rule, index
        self._loss_reduction: LossReduction | None = loss_reduction
        check_grouping(group_size, None)
        self._group_size = group_size
        self._on_unsupported: OnUnsupported = check_on_unsupported(on_unsupported)
        self._trainer: Trainer | None = None
        self._monitor: GradientMonitor | None = None
        self._measured: _Measured | None = None
        self._unlogged: dict[str, float] = {}
        self._surprising: dict[int, Surprise] = {}

    @property
    def records(self) -> list[Record]:
        """The records of the micro-batches of the last measured step."""
        return [] if self._monitor is None else self._monitor.records

    @property
    def reports(self) -> list[Report]:
        """The reports of the rule on the same."""
        return [] if self._monitor is None else self._monitor.reports

    @property
    def history(self) -> list[dict[str, float]]:
        """For each measured step of the last `train()` its scalars, and its number as `"step"`."""
        return [] if self._monitor is None else self._monitor.history

    @property
    def surprising(self) -> list[Surprise]:
        """The `top` examples of this epoch with the largest gradients, each once, largest first.

        They are those of this process, at measured steps.
        """
        return heapq.nlargest(self._top, self._surprising.values(), key=_surprise)

    def attach(self, trainer: Trainer) -> None:
        """Say which Trainer calls this callback, where it cannot find that out by itself."""
        self._trainer = trainer

    def _begin(self, trainer: Trainer) -> None:
        _check(trainer)
        refuse(
            isinstance(self._rule, WeightRule)
            and isinstance(trainer.model_wrapped, DistributedDataParallel),
            "DistributedDataParallel averages gradients in the backward pass, and those of a rule "
            "over whole examples are made after it",
            "take a rule over coordinates such as pc.Median(), train in one process, or call "
            "pc.aggregate with group= in a loop of your own",
        )
        model = trainer.model
        assert isinstance(model, nn.Module)
        self._monitor = GradientMonitor(
            model,
            *self._statistics,
            rule=self._rule,
            every=self._every,
            loss_reduction="sum",
            group_size=self._group_size,
            on_unsupported=self._on_unsupported,
        )
        self._monitor.steps = trainer.state.global_step  # after a checkpoint not zero
        self._unlogged = {}
        self._surprising = {}
        # Trackers read the logs in their turn, so that what is added has to come before them.
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self._detach()
        if not isinstance(trainer, PerExampleTrainer):
            self._measured = _Measured(trainer, self)

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise UnsupportedError(
                "the Trainer that calls this callback was not found. What to do: call "
                "callback.attach(trainer) before trainer.train(), or take a class with the mixin "
                "PerExampleTrainer."
            )
        return self._trainer

    def _detach(self) -> None:
        measured, self._measured = self._measured, None
        if measured is not None:
            measured.remove()

    def training_step(
        self,
        trainer: Trainer,
        step: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Measure a `training_step` of the Trainer, which is forward and backward pass at once."""
        monitor = self._monitor
        if monitor is None:
            raise RuntimeError("training_step was called outside trainer.train()")
        index = self._take_index(inputs) if self._top else None
        if not monitor.measures and self._rule is None:
            return step(model, inputs, num_items_in_batch)
        model.train()  # as training_step begins, but before the block looks at the modules
        scale = _Scale(trainer, inputs, num_items_in_batch, self._loss_reduction, self._group_size)
        with (
            scale.watching(model),
            monitor.micro_batch(
                loss_scale=scale, loss_reduction="sum", last=trainer.accelerator.sync_gradients
            ),
        ):
            loss = step(model, inputs, scale.items)
        if index is not None and monitor.measures:
            self._note(index, monitor.records[-1], trainer.state.global_step + 1)
        return loss

    def _take_index(self, inputs: dict[str, Any]) -> Tensor:
        index = inputs.pop(self._index, None)
        if index is None:
            raise ValueError(
                f"expected a column {self._index!r} in each batch, which top= tells examples by, "
                f"got {', '.join(inputs)}; add it to the dataset, give the Trainer "
                f"data_collator=KeepIndex(your_collator, {self._index!r}) and "
                "remove_unused_columns=False, or leave top= out"
            )
        return torch.as_tensor(index).flatten()

    def _note(self, index: Tensor, record: Record, step: int) -> None:
        index = index[:: self._group_size]
        if len(index) != record.batch_size:
            raise ValueError(
                f"expected an index for each of {record.batch_size} examples, got {len(index)}; "
                "let the dataset give one to each, before examples are packed"
            )
        for at, norm in zip(index.tolist(), record.sq_norms.sqrt().tolist(), strict=True):
            new = Surprise(at, norm, step)
            if at not in self._surprising or _surprise(self._surprising[at]) < _surprise(new):
                self._surprising[at] = new
        self._surprising = {one.index: one for one in self.surprising}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a run."""
        self._begin(_trainer_of(self) or self._attached())

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the surprising examples of the epoch before."""
        self._surprising = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a step, whose micro-batches are complete."""
        assert self._monitor is not None
        self._unlogged = self._monitor.step() or self._unlogged

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the scalars of the last measured step to the Trainer's own, if they are new."""
        if logs is not None and "loss" in logs and self._unlogged:
            logs.update(self._unlogged)
            state.log_history[-1].update(self._unlogged)
            self._unlogged = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a run."""
        self._detach()


class PerExampleTrainer(Trainer):
    """A mixin that measures in `training_step`, for Trainers with a `PerExampleCallback`.

    The callback needs no subclass, since it finds the Trainer that calls it. If it cannot, this
    class shows itself to it. It comes first among the bases:
    `class MyTrainer(PerExampleTrainer, SFTTrainer): ...`.

    Raises:
        ValueError: From `train()`: there is not one `PerExampleCallback` among the callbacks. See
            `PerExampleCallback` also.

    Cost: That of `PerExampleCallback`.

    Example:
        >>> from transformers import Trainer
        >>> from pycoherence.integrations.transformers import PerExampleTrainer
        >>> class MyTrainer(PerExampleTrainer, Trainer):
        ...     pass
        >>> # MyTrainer(model, args, train_dataset=data, callbacks=[PerExampleCallback()]).train()
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the other base does."""
        self.per_example.attach(self)
        return super().train(*args, **kwargs)

    @property
    def per_example(self) -> PerExampleCallback:
        """The `PerExampleCallback`, which has the records."""
        callbacks = self.callback_handler.callbacks
        found = [one for one in callbacks if isinstance(one, PerExampleCallback)]
        if len(found) != 1:
            raise ValueError(
                f"expected one PerExampleCallback among the callbacks, got {len(found)}; give the "
                "Trainer callbacks=[PerExampleCallback(pc.SqNorms())]"
            )
        return found[0]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Measure the forward and backward pass of one micro-batch."""
        step = super().training_step
        return self.per_example.training_step(self, step, model, inputs, num_items_in_batch)


class KeepIndex:
    """A collator that keeps the indices of examples, which many collators drop.

    Args:
        collator: Makes a batch of the examples without their indices.
        index: The name of the column, for examples and batches.

    Cost: That of the collator.

    Example:
        >>> from transformers import default_data_collator
        >>> from pycoherence.integrations.transformers import KeepIndex
        >>> collate = KeepIndex(default_data_collator)
        >>> collate([{"x": 0.5, "index": 7}, {"x": 1.5, "index": 2}])
        {'x': tensor([0.5000, 1.5000]), 'index': tensor([7, 2])}
    """

    def __init__(self, collator: Callable[[list[Any]], Any], index: str = "index") -> None:
        self._collator, self._index = collator, index

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Make a batch of examples.

        Raises:
            ValueError: An example has no index.
        """
        for example in examples:
            if self._index not in example:
                raise ValueError(
                    f"expected a column {self._index!r} in the dataset, got "
                    f"{', '.join(example)}; add one that numbers the examples, and give the "
                    "Trainer remove_unused_columns=False"
                )
        rest = [{k: v for k, v in one.items() if k != self._index} for one in examples]
        batch = self._collator(rest)
        batch[self._index] = torch.tensor([int(one[self._index]) for one in examples])
        return batch


class _Measured:
    """Stands in a Trainer's place of `training_step` during a run.

    A step's error does not end it, as the caller may leave that batch out and go on. No event says
    that an error has ended the run; the next run removes what was left.
    """

    def __init__(self, trainer: Trainer, callback: PerExampleCallback) -> None:
        left = vars(trainer).get("training_step")
        if isinstance(left, _Measured) and left.is_stale(callback):
            left.remove()
        self._trainer, self._callback = trainer, callback
        self._before = vars(trainer).get("training_step")
        self._step = trainer.training_step
        self._is_removed = False
        vars(trainer)["training_step"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_removed:
            return self._step(*args, **kwargs)
        return self._callback.training_step(self._trainer, self._step, *args, **kwargs)

    def is_stale(self, callback: PerExampleCallback) -> bool:
        """Whether it is of an earlier run, when one with this callback begins."""
        others = self._trainer.callback_handler.callbacks
        return self._callback is callback or self._callback not in others

    def remove(self) -> None:
        """Give the place back; do nothing more for a function that was put over it."""
        own, self._is_removed = vars(self._trainer), True
        if own.get("training_step") is not self:
            return
        if self._before is None:
            del own["training_step"]
        else:
            own["training_step"] = self._before


Source = Literal["function", "model", "compute_loss"]
"""The maker of a loss."""

_SOURCES: tuple[Source, ...] = ("function", "model", "compute_loss")
"""Each is scaled after those before it."""


class _Scale:
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


def _surprise(one: Surprise) -> float:
    return math.inf if math.isnan(one.norm) else one.norm


def _trainer_of(callback: PerExampleCallback) -> Trainer | None:
    """The Trainer that is calling a callback, to which it gives its model, but not itself."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    return None


def _check(trainer: Trainer) -> None:
    """Refuse Trainers whose passes cannot be measured."""
    args, step = trainer.args, (OptimizerNames.LOMO, OptimizerNames.ADALOMO)
    sliced = [getattr(trainer, f"get_{kind}_size", lambda: 1)() for kind in ("cp", "sp")]
    check_version("transformers", transformers.__version__, "5.12")
    check_accelerator(trainer.accelerator)
    refuse(
        args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED),
        f"parallel_mode {args.parallel_mode.value} runs copies of the model in one process",
        "start one process for each GPU with torchrun, or show the Trainer one GPU",
    )
    refuse(
        any(size > 1 for size in sliced),
        "each process has a slice of the sequence, and so a part of each example",
        "leave context and sequence parallelism out",
    )
    refuse(
        args.optim in step,
        f"the optimizer {args.optim} steps inside backward()",
        "take an optimizer that steps after it, such as adamw_torch",
    )
