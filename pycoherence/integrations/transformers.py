"""Per-example gradients in the `Trainer` of transformers."""

import heapq
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames, ParallelMode

from pycoherence.capture import OnUnsupported, check_grouping
from pycoherence.errors import UnsupportedError
from pycoherence.integrations._refusals import check_version, refuse
from pycoherence.integrations._trainer_scale import TrainerScale
from pycoherence.integrations.accelerate import check_accelerator
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

    Source: McCandlish et al. 2018, arXiv:1812.06162, for the noise scale; each statistic and rule
    names its own.

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
        scale = TrainerScale(
            trainer, inputs, num_items_in_batch, self._loss_reduction, self._group_size
        )
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
