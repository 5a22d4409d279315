"""Per-example gradients in the Trainer of Lightning, `lightning.pytorch` or `pytorch_lightning`."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pycoherence.capture import GradScale, OnUnsupported
from pycoherence.errors import UnsupportedError
from pycoherence.monitor import GradientMonitor
from pycoherence.ranks import Group
from pycoherence.record import LossReduction, Record
from pycoherence.robust import Report, Rule
from pycoherence.statistics import Statistic

__all__ = ["PerExampleCallback"]

PACKAGES = "lightning.pytorch", "pytorch_lightning"
_OWN = {"lightning", "pytorch_lightning", "lightning_fabric"}

_LOOP = "measure in a loop of your own with pc.GradientMonitor"
_REFUSED = {
    "FSDPStrategy": "FSDP1 joins parameters into one, in which none can be told apart. What to do: "
    "use ModelParallelStrategy, and torch.distributed.fsdp.fully_shard in configure_model; or "
    'strategy="ddp"',
    "DeepSpeedStrategy": "the engine of DeepSpeed divides the loss and keeps the gradients. What "
    f'to do: use strategy="ddp", or {_LOOP}',
    "XLAStrategy": f"XLA traces the passes. What to do: use another device, or {_LOOP}",
    "SingleDeviceXLAStrategy": f"XLA traces the passes. What to do: use another device, or {_LOOP}",
}


class PerExampleCallback:
    r"""Measures the per-example gradients of each training step of Lightning's Trainer.

    .. math:: g_b = \nabla_w \ell_b

    It opens a block of `pycoherence.collect`, or with `rule` of `pycoherence.aggregate`, before
    `training_step` and leaves it after the backward pass. No change of the `LightningModule` is
    needed. The numbers of each measured step go to all loggers of the Trainer, at the step they
    belong to, and to `trainer.callback_metrics` for other callbacks.

    Scaling: `g_b` is the gradient of example b's own loss as `training_step` returns it, whatever
    Lightning divides or multiplies it by: `accumulate_grad_batches`, also if a
    `GradientAccumulationScheduler` changes it, and the `GradScaler` of `precision="16-mixed"`.

    The class made on call is also a `Callback` of the package that the Trainer is of: of each of
    `lightning.pytorch` and `pytorch_lightning` that is imported by then.

    Manual optimization runs any number of passes in `training_step`, so that nothing is opened for
    it: there `training_step` opens `micro_batch` around each forward and backward pass.

    An optimizer that runs its closure several times in one step, such as L-BFGS, is measured in the
    first run, at the weights where the step begins; with `rule` it is refused.

    Args:
        statistics: The statistics to measure, as in `pycoherence.collect`; `pc.SqNorms()` if none
            is given.
        rule: The robust rule that makes `.grad` of each step, as in `pycoherence.aggregate`.
            Gradient clipping and the optimizer get its result. Its `expected_batch_size` counts the
            examples of a whole step, and Lightning does not divide once more what that divides.
        every: Measure each `every`-th optimizer step. A rule is applied in all of them.
        loss_reduction: How `training_step` joins the examples' losses, by a `"mean"` or a `"sum"`.
        group_size: How many consecutive rows of the batch make one example.
        on_unsupported: The treatment of parameters used in ways that are not known, as in
            `pycoherence.collect`.
        group: The processes whose examples count together: `"world"` for all of the Trainer, a
            process group, or a mesh; `None` for each process alone. Loggers write the numbers of
            the first process.

    Attributes:
        monitor: The `pycoherence.GradientMonitor` of the last `trainer.fit`; `None` before any.

    Raises:
        ImportError: Neither package is installed.
        UnsupportedError: From `trainer.fit`, before the first step: a strategy (FSDP1, DeepSpeed,
            XLA), a compiled module or a precision plugin under which the gradients or the scale of
            the loss cannot be known. Later: `rule` and a closure that runs twice, or a `backward`
            of the module that multiplies the loss.
        ValueError: From `trainer.fit`, see `pycoherence.GradientMonitor`.
        RuntimeError: In manual optimization, the first optimizer step came without any
            `micro_batch`, or several optimizers end steps that were measured.

    Cost: That of `pycoherence.collect` or `pycoherence.aggregate` in each measured step.

    Source: Chatterjee and Zielinski 2022, arXiv:2203.10036, for the coherence; each statistic and
    rule names its own.

    Example:
        >>> import torch, warnings
        >>> warnings.simplefilter("ignore")  # Lightning's, about this tiny Trainer
        >>> import lightning.pytorch as L
        >>> from pycoherence.integrations.lightning import PerExampleCallback
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 1, bias=False)
        ...     def training_step(self, batch, index):
        ...         return self.layer(batch).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = PerExampleCallback()
        >>> quiet = {"logger": False, "barebones": True, "accelerator": "cpu"}
        >>> trainer = L.Trainer(max_steps=2, callbacks=[callback], **quiet)
        >>> trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(8, 3), batch_size=4))
        >>> callback.records[0].sq_norms
        tensor([3., 3., 3., 3.])
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PerExampleCallback":
        """An object that is a `Callback` of the packages that are imported."""
        return object.__new__(_hosted(cls, _callbacks()))

    def __init__(
        self,
        *statistics: Statistic,
        rule: Rule | None = None,
        every: int = 1,
        loss_reduction: LossReduction = "mean",
        group_size: int = 1,
        on_unsupported: OnUnsupported = "auto",
        group: Group | Literal["world"] | None = None,
    ) -> None:
        self._statistics = statistics
        self._rule = rule
        self._options: dict[str, Any] = {
            "every": every,
            "loss_reduction": loss_reduction,
            "group_size": group_size,
            "on_unsupported": on_unsupported,
        }
        self._group = group
        self.monitor: GradientMonitor | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin before any training step."""
        self._precision: Any = None  # of the Trainer, while it fits
        self._automatic = True
        self._passes = 0  # backward passes of this batch
        self._pending = False  # whether a pass was measured since the last step
        self._opened = False  # whether training_step has ever opened a block of its own
        self._optimizer: Any = None  # the one that ends steps in manual optimization
        self._factors: list[Tensor] = []

    def __reduce__(self) -> Any:
        # The class made on call has no name by which it could be found.
        public = next(c for c in type(self).__mro__[1:] if issubclass(c, PerExampleCallback))
        return _remade, (public,), self.__dict__

    @property
    def records(self) -> list[Record]:
        """The record of each micro-batch of the last measured step, in their order."""
        return [] if self.monitor is None else self.monitor.records

    @property
    def reports(self) -> list[Report]:
        """The report of `rule` on each micro-batch of the last measured step."""
        return [] if self.monitor is None else self.monitor.reports

    @property
    def history(self) -> list[dict[str, float]]:
        """The numbers of all measured steps of the last `trainer.fit`, as they were logged."""
        return [] if self.monitor is None else self.monitor.history

    @contextmanager
    def micro_batch(
        self,
        loss_scale: float = 1.0,
        loss_reduction: LossReduction | None = None,
        last: bool = True,
    ) -> Iterator[None]:
        """Measure one forward and backward pass, in `training_step` with manual optimization.

        The passes up to the next `step()` of an optimizer that `self.optimizers()` gives are the
        micro-batches of its step.

        Args:
            loss_scale: The number that `training_step` multiplies the loss by itself, such as
                `1 / 4` for four micro-batches. A `GradScaler` of the Trainer is known.
            loss_reduction: How this loss joins its examples, if not as the callback was told.
            last: Whether the step has no other after it, which a rule with noise has to know.

        Raises:
            RuntimeError: No fit is running, or its optimization is automatic.
        """
        if self._precision is None:
            raise RuntimeError(
                "micro_batch belongs into training_step while trainer.fit runs; in a loop of your "
                "own use pc.GradientMonitor(model, ...).micro_batch()"
            )
        if self._automatic:
            raise RuntimeError(
                "with automatic optimization the callback opens its blocks itself; leave "
                "micro_batch out, or set self.automatic_optimization = False in the module"
            )
        self._opened = True
        scale = loss_scale * _scale(self._precision)
        options: dict[str, Any] = {"loss_reduction": loss_reduction, "last": last}
        options["grad_scale"] = _grad_scale(self._precision)
        with self._measuring.micro_batch(loss_scale=scale, **options):
            yield
        self._pending = True

    def state_dict(self) -> dict[str, Any]:
        """The state that the rule carries from step to step, for the Trainer's checkpoints."""
        return {} if self._rule is None else self._rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back; a rule of another kind begins anew."""
        if self._rule is not None and state_dict.keys() == self._rule.state_dict().keys():
            self._rule.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be measured, and make the monitor."""
        _expect_supported(trainer, pl_module)
        self._leave(None)
        self._forget()
        self.monitor = GradientMonitor(
            trainer.strategy.model,
            *self._statistics,
            rule=self._rule,
            group=self._processes(trainer),
            **self._options,
        )
        self._precision = trainer.precision_plugin

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count on from the step of a checkpoint, which is known by now."""
        self._measuring.steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Open the block of a batch."""
        self._automatic = pl_module.automatic_optimization
        self._passes = 0
        if self._automatic:
            # Lightning divides by it in each batch, also in a last incomplete accumulation.
            precision, divisor = self._precision, trainer.accumulate_grad_batches
            begins = batch_idx % divisor == 0
            if self._pending and begins and not _is_overridden(pl_module, "optimizer_zero_grad"):
                # An optimizer_step of the module's own took no step, and its gradients are zeroed.
                self._measuring.restart()
                self._pending = False
            # A scaler is asked in measured passes alone, since the host waits for its answer.
            last = not trainer.fit_loop._should_accumulate()
            self._measuring.open(
                loss_scale=lambda _: _scale(precision) / divisor,
                last=last,
                grad_scale=_grad_scale(precision),
            )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Watch what the backward pass begins with."""
        if not self._automatic:
            return
        if self._passes and self._rule is not None:
            raise UnsupportedError(
                "the optimizer runs its closure several times in one step, as L-BFGS does, and "
                "the rule has made the gradients of the first run alone. What to do: use an "
                "optimizer that needs one gradient, or measure with rule=None"
            )
        self._factors = []
        if _is_overridden(pl_module, "backward") and loss.requires_grad:
            loss.register_hook(self._factors.append)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Leave the block of a batch."""
        if not self._automatic:
            return
        self._passes += 1
        if any(factor.item() != 1 for factor in self._factors):
            raise UnsupportedError(
                f"{type(pl_module).__name__}.backward multiplies the loss, by a number that the "
                "callback would have to guess. What to do: multiply in training_step, or set "
                "self.automatic_optimization = False and open callback.micro_batch(loss_scale=...)"
            )
        self._measuring.close()
        self._pending |= self._passes == 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Finish a step, and log it."""
        if self._automatic:
            self._leave(None)
        else:
            self._expect_one(optimizer)
        if not self._pending:
            return  # a closure that runs again, or another optimizer
        self._pending = False
        values = self._measuring.step()
        if values:
            self._log(trainer, values)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Leave a block that saw no backward pass, as if `training_step` has returned `None`."""
        self._leave(None)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Leave out the batches of a step that a hook has skipped with the rest of the epoch."""
        if self._automatic:  # Lightning drops their gradients
            self._measuring.restart()
            self._pending = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the block in which an error was raised."""
        self._leave(exception)
        self._forget()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the Trainer go; what was measured stays."""
        self._leave(None)
        self._forget()

    @property
    def _measuring(self) -> GradientMonitor:
        assert self.monitor is not None, "Lightning begins with on_fit_start"
        return self.monitor

    def _leave(self, error: BaseException | None) -> None:
        """Leave a block that is still open; its pass has not come to an end."""
        if self.monitor is not None:
            self.monitor.abandon(error)

    def _expect_one(self, optimizer: Any) -> None:
        """Refuse manual optimization whose steps are not those of one series."""
        if not self._opened:
            raise RuntimeError(
                "manual optimization runs its passes in training_step, where none was measured; "
                "open `with callback.micro_batch():` around each forward and backward pass"
            )
        if self._pending and self._optimizer not in (None, optimizer):
            raise RuntimeError(
                "two optimizers take steps of their own, whose numbers would be mixed in one "
                "series; make a pc.GradientMonitor for the network of each, and open its "
                "micro_batch(loss_scale=...) in training_step"
            )
        if self._pending:
            self._optimizer = optimizer

    def _processes(self, trainer: Any) -> Group | None:
        if self._group != "world":
            return self._group
        return dist.group.WORLD if trainer.world_size > 1 else None

    def _log(self, trainer: Any, values: Mapping[str, float]) -> None:
        # log_dict would write them at steps of its own choice and at later ones again, and takes
        # milliseconds.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(x) for name, x in values.items()})


def _remade(public: type[PerExampleCallback]) -> PerExampleCallback:
    return public.__new__(public)


@cache
def _hosted(public: type, callbacks: tuple[type, ...]) -> type:
    """A subclass that is a `Callback` too."""
    return type(
        public.__name__,
        (public, *callbacks),
        {"__module__": public.__module__, "__qualname__": public.__qualname__},
    )


def _callbacks() -> tuple[type, ...]:
    """The `Callback` of each package that is imported; if none is, of the first installed."""
    names = [name for name in PACKAGES if name in sys.modules]
    if not names:
        names = [name for name in PACKAGES if find_spec(name.partition(".")[0])][:1]
    if not names:
        raise ImportError(
            "PerExampleCallback needs Lightning: pip install lightning, or pytorch_lightning"
        )
    return tuple(import_module(name).Callback for name in names)


def _scale(precision: Any) -> float:
    """The number by which a precision plugin multiplies losses."""
    scaler = getattr(precision, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _grad_scale(precision: Any) -> GradScale:
    """The part of the loss's scale that the optimizer divides gradients by again."""
    return getattr(precision, "scaler", None) or 1.0


def _is_overridden(value: Any, name: str) -> bool:
    """Whether a method of an object is somebody else's than Lightning's."""
    if name in vars(value):
        return True
    home = next((c for c in type(value).__mro__ if name in vars(c)), None)
    return home is not None and home.__module__.partition(".")[0] not in _OWN


def _expect_supported(trainer: Any, pl_module: Any) -> None:
    """Refuse a Trainer under which gradients, or the scale of the loss, cannot be known."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    kind = next((name for name in kinds if name in _REFUSED), None)
    if kind is not None:
        raise UnsupportedError(f"{kind}: {_REFUSED[kind]}.")
    if trainer.strategy.handles_gradient_accumulation:
        raise UnsupportedError(
            f"{kinds[0]}: it accumulates gradients itself, so that the number it divides the loss "
            f'by is not known. What to do: use strategy="ddp", or {_LOOP}.'
        )
    precision = trainer.precision_plugin
    changed = [x for x in ("pre_backward", "backward") if _is_overridden(precision, x)]
    if changed:
        raise UnsupportedError(
            f"{type(precision).__name__}.{changed[0]}: it may multiply the loss, by a number that "
            "is not known. What to do: use a precision of Lightning's own such as "
            f'"bf16-mixed", or {_LOOP}.'
        )
    if pl_module._compiler_ctx is not None:
        raise UnsupportedError(
            f"{type(pl_module).__name__} is compiled, and a block runs it as it was written, "
            "without what it was compiled for. What to do: give the Trainer the module itself, "
            "not torch.compile(module)."
        )
