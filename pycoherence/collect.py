"""Statistics of the per-example gradients of one backward pass."""

from contextlib import nullcontext
from types import TracebackType

from torch import nn

from pycoherence.capture import (
    Capture,
    GroupBy,
    LossScale,
    OnUnsupported,
    check_batch_norm,
    check_grouping,
    check_loss_scale,
    tracked_parameters,
)
from pycoherence.ranks import Group, Ranks, check_group, ranks_of
from pycoherence.record import (
    LossReduction,
    Record,
    check_loss_reduction,
    check_on_unsupported,
    record_of,
)
from pycoherence.statistics import Statistic, combine


class collect:
    r"""Measure the per-example gradients of the forward and backward pass inside a `with` block.

    .. math:: g_b = B \cdot \nabla_w \frac{1}{B} \ell_b \ \text{(mean)}
        \qquad g_b = \nabla_w \ell_b \ \text{(sum)}

    `.grad` is filled as always, by the same pass that measures. Nothing is left on the model: the
    hooks that guard `backward()` are gone when it returns.

    The first dimension of what comes into the block is the batch, unless
    `pycoherence.mark_examples` says otherwise; from there on examples are followed through every
    function. Forward and backward pass run inside the block; a parameter may be used any number of
    times in it, and what is made of parameters alone may be used in their place.

    Args:
        model: Any module. Parameters with `requires_grad=False` are not measured.
        statistics: The statistics to measure, such as `pc.SqNorms()`; each kind once.
        loss_reduction: How the loss joins its per-example terms. With `"mean"` the mean of the
            `g_b` is the gradient, with `"sum"` their sum is.
        keep_factors: Keep what the per-example gradients are made of, the inputs and the output
            gradients of all layers, for `Record.weighted_sum`.
        group_size: How many consecutive rows of the batch make one example, such as those of one
            user. `B` is then the number of groups, and `g_b` the gradient of the mean or the sum of
            the losses in group b, as `loss_reduction` says.
        group_by: In place of `group_size`, the example of each row, `[rows]` of whole numbers from
            0 without gaps, or a function of the number of rows that gives it. Rows b and b + B of a
            batch that holds all chosen answers and then all rejected ones, as for DPO, are one
            example with `torch.arange(B).repeat(2)`.
        on_unsupported: The treatment of a parameter that meets examples in a function nobody has
            described: `"auto"` makes its gradients example by example if `B` times the parameter
            fits the workspace (`Record.fallbacks` lists it) and refuses it otherwise, `"raise"`
            refuses it, `"skip"` leaves it out (`Record.skipped` lists it), and `"vmap"` makes them
            example by example whatever memory it takes.
        loss_scale: The number that the loss is multiplied by before `backward()`, or the
            `torch.amp.GradScaler` that does it, read when `backward()` runs, or a function that
            gives the number for the loss that `backward()` is called on. All results are divided
            by it, and `.grad` is not.
        group: The processes whose examples count together, a `torch.distributed.ProcessGroup` or a
            `DeviceMesh`; `None` for this process alone. All of them run the block. The record then
            is of all their examples, in the order of global ranks, and the same on each;
            `Record.local` is that of this process. `g_b` is as in one process with one loss over
            all examples, also if the processes have different numbers of them. `.grad` is filled
            as without it.

    Returns:
        On entering, the `Record` that holds the results once `backward()` has run.

    Raises:
        ValueError: No statistic, two of one kind, no parameter to track, an unknown
            `loss_reduction`, `group_size`, `group_by` or `loss_scale`, or directions that do not
            fit the parameters.
        RuntimeError: The blocks of two `collect` are nested; on entering, `torch.distributed` has
            no process groups yet, or this process is not in `group`.
        RanksError: From `backward()` or on leaving, on all processes of `group`: they run
            different passes, or one of them has raised an error.
        TypeError: A statistic is a class instead of an object, `group_size` is not an integer,
            `group_by` holds something else than integers, `group` is neither a process group nor a
            mesh, or a direction has a dtype or device that does not fit.
        UnsupportedError: On entering, from a BatchNorm layer in training mode; in the block, from
            a parameter used in a way that is not known or batch sizes that disagree or are not
            whole groups; from `backward()`, before it starts, if a gradient would reach a parameter
            and bypass the capture, or with `group` if a parameter is a slice by tensor parallelism.

    Cost: One forward and backward pass, in which each weight gradient is computed together with its
    statistics; memory as each statistic says, `O(B)` for each parameter with `SqNorms`. With
    `group`, each of `R` processes receives for `SqNorms` as many numbers as half the average of
    the gradients takes, `(R - 1) / R` for each of the model's, and one for each example and
    parameter of the others; docs/distributed.md has the other statistics.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        ...     model(x).sum().backward()
        >>> record.sq_norms
        tensor([1., 1., 1.])
        >>> record.coherence().m
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        *statistics: Statistic,
        loss_reduction: LossReduction = "mean",
        keep_factors: bool = False,
        group_size: int = 1,
        group_by: GroupBy | None = None,
        on_unsupported: OnUnsupported = "auto",
        loss_scale: LossScale = 1.0,
        group: Group | None = None,
    ) -> None:
        check_loss_reduction(loss_reduction)
        if not statistics and not keep_factors:
            raise ValueError("expected one or more statistics such as pc.SqNorms(), got none")
        combine(statistics, tracked_parameters(model))  # so that what does not fit raises here
        self._model = model
        self._statistics = statistics
        self._keep_factors = keep_factors
        self._grouping = check_grouping(group_size, group_by)
        self._on_unsupported = check_on_unsupported(on_unsupported)
        self._loss_scale = check_loss_scale(loss_scale)
        self._group = check_group(group)
        self._capture: Capture | None = None
        self._loss_reduction: LossReduction = loss_reduction

    def __enter__(self) -> Record:
        if self._capture is not None:
            raise RuntimeError("this collect has been used; make a new one for each batch")
        ranks = ranks_of(self._group)
        with nullcontext() if ranks is None else ranks.opening():
            return self._open(ranks)

    def _open(self, ranks: Ranks | None) -> Record:
        check_batch_norm(self._model)
        parameters = tracked_parameters(self._model)
        request = combine(self._statistics, parameters)._replace(
            factors=self._keep_factors,
            grouping=self._grouping,
            on_unsupported=self._on_unsupported,
            loss_scale=self._loss_scale,
            ranks=ranks,
            is_mean=self._loss_reduction == "mean",
        )
        capture = Capture(self._model, parameters, request)
        capture.__enter__()
        self._capture = capture
        return record_of(capture, request, self._statistics, self._loss_reduction)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._capture is not None:
            self._capture.__exit__(kind, error, trace)
            self._capture.forget()
            self._capture.leave(kind)

    @property
    def capture(self) -> Capture:
        """The capture of the block."""
        if self._capture is None:
            raise RuntimeError("the block has not been entered")
        return self._capture
