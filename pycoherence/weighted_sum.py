"""A weighted sum of per-example gradients, with weights that may depend on their statistics."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from pycoherence.capture import (
    Capture,
    GroupBy,
    LossFn,
    check_grouping,
    run_pass,
    tracked_parameters,
)
from pycoherence.ranks import Group, ranks_of
from pycoherence.record import (
    LossReduction,
    Record,
    check_loss_reduction,
    check_on_unsupported,
    record_of,
)
from pycoherence.statistics import SqNorms, Statistic, combine


def weighted_sum(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    coef: Tensor | Callable[[Record], Tensor],
    *statistics: Statistic,
    loss_reduction: LossReduction = "mean",
    group_size: int = 1,
    group_by: GroupBy | None = None,
    on_unsupported: Literal["auto", "raise", "vmap"] = "auto",
    group: Group | None = None,
) -> dict[str, Tensor]:
    r"""A weighted sum of the per-example gradients of a batch, in one forward and backward pass.

    .. math:: w = \sum_b c_b g_b

    The weights may be made from the statistics of this very pass: norm clipping, for one, is
    `lambda record: (max_norm / record.sq_norms.sqrt()).clamp(max=1)`. The model and its `.grad`
    stay untouched.

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says; divide by `B`
    for a weighted mean.

    Args:
        model: Any module.
        loss_fn: `loss_fn(model, batch)` gives the loss of the batch, a scalar tensor.
        batch: Passed on as it is.
        coef: The weights `[B]`, floating, on the model's device; or what makes them from the
            record of the pass. An example of weight zero is left out, even if it is not finite.
        statistics: Those of the record; `SqNorms()` if none is given. It has no `coherence()`: for
            both, use `collect(..., keep_factors=True)` and `Record.weighted_sum`.
        loss_reduction: How `loss_fn` joins per-example losses.
        group_size: How many consecutive rows make one example, as in `pycoherence.collect`.
        group_by: In place of `group_size`, the example of each row, as in `pycoherence.collect`.
        on_unsupported: `"auto"`, `"raise"` or `"vmap"`, as in `pycoherence.collect`.
        group: The processes whose examples count together, as in `pycoherence.collect`; all of
            them call this. The weights `[B]` and the record are then those of all examples, in the
            order of global ranks, and the result is the same on each.

    Returns:
        For each parameter that requires a gradient a tensor of its shape, in float32 (float64 for
        float64 models).

    Raises:
        ValueError: The loss is not a scalar or does not use the model, the weights are not `[B]`,
            or as in `pycoherence.collect`.
        TypeError: The weights are not floating or on another device.
        RuntimeError: See `pycoherence.collect`, with `group`.
        RanksError: See `pycoherence.collect`.
        UnsupportedError: See `pycoherence.collect`.

    Cost: One forward and backward pass with the statistics, in which no weight gradient is
    computed, then the weighted ones; memory of the inputs and output gradients of all layers. With
    `group` also one sum over the processes of a number for each of the model's.

    Source: Bu et al. 2023, arXiv:2210.00038.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> pc.weighted_sum(
        ...     model,
        ...     lambda model, x: model(x).mean(),
        ...     x,
        ...     lambda record: (1 / record.sq_norms.sqrt()).clamp(max=1),
        ... )
        {'weight': tensor([[0.6000, 1.3000]])}
    """
    check_loss_reduction(loss_reduction)
    grouping = check_grouping(group_size, group_by)
    asked = statistics or (SqNorms(),)
    parameters = tracked_parameters(model)
    # Norms of the sum would take the sum, whose cost is what this function saves.
    request = combine(asked, parameters)._replace(
        sum_norms=False,
        factors=True,
        gradients=False,
        grouping=grouping,
        on_unsupported=check_on_unsupported(on_unsupported, skip=False),
        ranks=ranks_of(group),
        is_mean=loss_reduction == "mean",
    )
    capture = Capture(model, parameters, request)
    run_pass(capture, model, loss_fn, batch)
    record = record_of(capture, request, asked, loss_reduction)
    across = capture.across
    if across is None:
        return record.weighted_sum(coef(record) if callable(coef) else coef)
    with across.ranks.conversation():
        weights = coef(record) if callable(coef) else coef
        record.check_coef(weights)
        return across.totals(record.local.weighted_sum(weights[across.own]))
