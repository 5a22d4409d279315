"""Statistics of the steps of a training loop, and where they are written."""

import csv
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from pycoherence import scalars
from pycoherence.aggregate import NonFinite, aggregate
from pycoherence.capture import GradScale, GroupBy, LossScale, OnUnsupported
from pycoherence.collect import collect
from pycoherence.ranks import Group
from pycoherence.record import LossReduction, Record, pooled_scalars
from pycoherence.robust import Report, Rule, check_count
from pycoherence.statistics import SqNorms, Statistic

Log = Callable[[Mapping[str, float], int], object]
"""Takes the scalars of a step, and its number."""

_INSTEAD = (
    "a function of a dict and a step, a SummaryWriter, something with log(dict, step=), such as a "
    "run of W&B, or a path that ends in .csv"
)


class GradientMonitor:
    r"""Measures the steps of a training loop, of one or several micro-batches each.

    A step's micro-batches are pooled: norms over all their examples, and

    .. math:: \lVert G \rVert^2 = \frac{\sum_i S_i - Q_i}{\sum_i n_i (n_i - 1)}, \qquad
        \operatorname{tr} \Sigma = \frac{\sum_i Q_i - S_i / n_i}{\sum_i (n_i - 1)}

    with `S_i = ||sum_b g_b||^2` and `Q_i = sum_b ||g_b||^2` of the `n_i` examples of micro-batch i,
    whose ratio is the noise scale. With a rule, `.grad` is filled as `pycoherence.aggregate` fills
    it, at every step, also at those that are not measured.

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says; a loss divided
    by the number of micro-batches is undone by `loss_scale`.

    Args:
        model: Any module.
        statistics: The statistics to measure; `pc.SqNorms()` if none is given.
        rule: A rule such as `pc.NormClip(1.0)`, or `None`.
        every: Measure the first step, and each `every`-th after it.
        log: The place for the scalars of measured steps: a function `log(scalars, step)`, a
            `SummaryWriter` of TensorBoard, something with `log(scalars, step=step)` such as a run
            of W&B, or a path that ends in `.csv`, to which rows are added.
        loss_reduction: How the loss joins its per-example terms, as in `pycoherence.collect`.
        group_size: How many consecutive rows make one example, as in `pycoherence.collect`.
        group_by: In place of `group_size`, a function of the number of rows of a micro-batch, which
            gives the example of each; as in `pycoherence.collect`.
        on_unsupported: The treatment of a parameter that is used in a way that is not known, as in
            `pycoherence.collect`.
        nonfinite: The rule's treatment of gradients that are not finite, as in
            `pycoherence.aggregate`.
        group: The processes whose examples count together, as in `pycoherence.collect`.

    Attributes:
        records: The records of the micro-batches of the last measured step.
        reports: The reports of the rule on them.
        history: For each measured step its scalars, and its number as `"step"`.
        steps: How many steps have ended.

    Raises:
        ValueError: `every` is less than one, a `.csv` file has other columns; or as in
            `pycoherence.collect`.
        TypeError: `log` is none of these; or as in `pycoherence.collect`.

    Cost: That of `pycoherence.collect` or `pycoherence.aggregate` at measured steps; nothing, or
    that of the rule, at the others. Scalars wait for the device.

    Source: McCandlish et al. 2018, arXiv:1812.06162, for the pooled noise scale.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> monitor = pc.GradientMonitor(model, every=2)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> for _ in range(3):
        ...     for part in x.split(2):
        ...         with monitor.micro_batch(loss_scale=1 / 2):
        ...             (model(part).mean() / 2).backward()
        ...     scalars = monitor.step()
        >>> [at["step"] for at in monitor.history], scalars["norm/mean"], scalars["noise_scale"]
        ([0, 2], 2.5, 0.07142857142857142)
    """

    def __init__(
        self,
        model: nn.Module,
        *statistics: Statistic,
        rule: Rule | None = None,
        every: int = 1,
        log: Log | str | PathLike[str] | Any | None = None,
        loss_reduction: LossReduction = "mean",
        group_size: int = 1,
        group_by: GroupBy | None = None,
        on_unsupported: OnUnsupported = "auto",
        nonfinite: NonFinite = "nan",
        group: Group | None = None,
    ) -> None:
        self._model, self._rule = model, rule
        self._statistics = statistics or (SqNorms(),)
        self._every = check_count("every", every, 1)
        self._write = _writer(log)
        self._loss_reduction: LossReduction = loss_reduction
        self._options: dict[str, Any] = {
            "group_size": group_size,
            "group_by": group_by,
            "on_unsupported": on_unsupported,
            "group": group,
        }
        if rule is not None:
            self._options["nonfinite"] = nonfinite
        elif nonfinite != "nan":
            raise ValueError(f"expected nonfinite={nonfinite!r} together with a rule, got no rule")
        self.records: list[Record] = []
        self.reports: list[Report] = []
        self.history: list[dict[str, float]] = []
        self.steps = 0
        self._parts = 0
        self._block: collect | aggregate | None = None
        self._record: Record | None = None
        self._make(1.0, loss_reduction)  # so that what does not fit raises here

    def __repr__(self) -> str:
        return f"GradientMonitor(steps={self.steps}, measured={len(self.history)})"

    @property
    def measures(self) -> bool:
        """Whether the step that is next, or under way, is measured."""
        return self.steps % self._every == 0

    @contextmanager
    def micro_batch(
        self,
        *,
        loss_scale: LossScale = 1.0,
        loss_reduction: LossReduction | None = None,
        last: bool = True,
        grad_scale: GradScale | None = None,
    ) -> Iterator[None]:
        """Run the forward and backward pass of one micro-batch inside.

        Args:
            loss_scale: The number that the loss is multiplied by, as in `pycoherence.collect`.
            loss_reduction: That of this loss, if it is another than the monitor's.
            last: Whether the step has no other after it, which a rule with noise has to know, as in
                `pycoherence.aggregate`.
            grad_scale: The number or scaler by which a rule with `expected_batch_size` multiplies
                `.grad`, as in `pycoherence.aggregate`.

        Raises:
            RuntimeError: No backward pass of the model was seen in the block.
        """
        options: dict[str, Any] = {"loss_reduction": loss_reduction, "grad_scale": grad_scale}
        self.open(loss_scale=loss_scale, last=last, **options)
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise
        self.close()

    def open(
        self,
        *,
        loss_scale: LossScale = 1.0,
        loss_reduction: LossReduction | None = None,
        last: bool = True,
        grad_scale: GradScale | None = None,
    ) -> None:
        """Begin a micro-batch, for loops that call hooks; `close` or `abandon` ends it.

        Args:
            loss_scale: See `micro_batch`.
            loss_reduction: See `micro_batch`.
            last: See `micro_batch`.
            grad_scale: See `micro_batch`.

        Raises:
            RuntimeError: One is open.
        """
        if self._block is not None:
            raise RuntimeError("a micro-batch is open; call close() or abandon() first")
        block = self._make(loss_scale, loss_reduction or self._loss_reduction, last, grad_scale)
        if block is None:
            return
        entered = block.__enter__()
        self._record = entered if isinstance(entered, Record) else entered.record
        self._block = block

    def close(self) -> None:
        """End a micro-batch, whose backward pass has run; nothing if none is open.

        Raises:
            RuntimeError: No backward pass of the model was seen in it.
        """
        block, record = self._block, self._record
        if block is None:
            return
        assert record is not None
        if not record.is_measured:
            self.abandon()
            raise RuntimeError(
                "no backward pass of the model was seen in the micro-batch, so that nothing was "
                "measured; run the forward pass and loss.backward() in it, or call abandon() for "
                "one that is left out"
            )
        self._block = self._record = None
        block.__exit__(None, None, None)
        if not self.measures:
            return
        if not self._parts:
            self.records, self.reports = [], []
        self._parts += 1
        self.records.append(record)
        if isinstance(block, aggregate):
            self.reports.append(block.report)

    def abandon(self, error: BaseException | None = None) -> None:
        """Leave a micro-batch out, such as one whose loss was none; nothing if none is open.

        Args:
            error: The reason.
        """
        block, self._block, self._record = self._block, None, None
        if block is not None:
            trace: TracebackType | None = None if error is None else error.__traceback__
            block.__exit__(Exception if error is None else type(error), error, trace)

    def restart(self) -> None:
        """Leave out all micro-batches since the last step, as one whose gradients are dropped."""
        self.abandon()
        self._parts = 0

    def step(self) -> dict[str, float] | None:
        """End a step: pool its micro-batches, and log them.

        Returns:
            The scalars, as `Record.scalars` has them, and of the rule `rule/clipped`, `rule/kept`
            and `rule/iterations`, means over parameters and micro-batches; `None` if the step is
            not measured.

        Raises:
            RuntimeError: A micro-batch is open.
        """
        if self._block is not None:
            raise RuntimeError("a micro-batch is open; call close() or abandon() before step()")
        number, measured = self.steps, bool(self._parts)
        self.steps, self._parts = self.steps + 1, 0
        if not measured:
            return None
        found = pooled_scalars(self.records) | scalars.of_reports(self.reports)
        self.history.append({"step": number, **found})
        self._write(found, number)
        return found

    def noise_scale(self, last: int | None = None) -> float:
        r"""The noise scale over measured steps: the mean variance over the mean squared norm.

        One step's own ratio is biased and noisy; means of both sides are taken first. Steps that
        cannot tell, such as one of a single example, are left out.

        Args:
            last: Over how many of them; all if `None`.

        Raises:
            ValueError: `last` is less than one.
            RuntimeError: No step has measured norms of two examples or more.
        """
        if last is not None:
            check_count("last", last, 1)
        found = [
            (at["gradient/variance"], at["gradient/sq_norm"])
            for at in self.history
            if "gradient/variance" in at
        ]
        found = [sides for sides in found if not any(map(math.isnan, sides))]
        if not found:
            raise RuntimeError(
                "no step has measured norms of two examples or more; give pc.SqNorms(), and call "
                "step()"
            )
        found = found if last is None else found[-last:]
        variance, sq_norm = map(sum, zip(*found, strict=True))
        return scalars.ratio(variance, sq_norm)

    def _make(
        self,
        loss_scale: LossScale,
        loss_reduction: LossReduction,
        last: bool = True,
        grad_scale: GradScale | None = None,
    ) -> collect | aggregate | None:
        """The block of a micro-batch; `None` if there is nothing to do in it."""
        options = {**self._options, "loss_scale": loss_scale, "loss_reduction": loss_reduction}
        asked = self._statistics if self.measures else ()
        if self._rule is not None:
            options |= {"last": last, "grad_scale": grad_scale}
            return aggregate(self._model, self._rule, *asked, **options)
        return collect(self._model, *asked, **options) if asked else None


def _writer(log: Any) -> Log:
    """The function that writes the scalars of a step."""
    if log is None:
        return lambda scalars, step: None
    if isinstance(log, (str, PathLike)):
        path = Path(log)
        if path.suffix != ".csv":
            raise ValueError(f"expected log to be {_INSTEAD}, got the path {str(path)!r}")
        return lambda scalars, step: _add_row(path, {"step": step, **scalars})
    if hasattr(log, "add_scalar"):
        return lambda scalars, step: [log.add_scalar(n, x, step) for n, x in scalars.items()]
    if hasattr(log, "log") and not isinstance(log, logging.Logger):
        return lambda scalars, step: log.log(dict(scalars), step=step)
    if callable(log) and not isinstance(log, type):
        return log
    raise TypeError(f"expected log to be {_INSTEAD}, got {log!r}")


def _add_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a file, whose first line has the names of the columns."""
    columns: Sequence[str] = list(row)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if set(columns) != set(row):
            raise ValueError(
                f"expected the columns {', '.join(row)} in {path}, got {', '.join(columns)}; "
                "write to another file"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
