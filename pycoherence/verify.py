"""Does the capture agree with plain autograd on this very model?"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map

from pycoherence.capture import (
    GroupBy,
    Grouping,
    Groups,
    LossFn,
    check_grouping,
    check_not_sharded,
    tracked_parameters,
    without_sync,
)
from pycoherence.errors import VerificationError
from pycoherence.meter import measure
from pycoherence.ranks import Group, ranks_of
from pycoherence.record import (
    LossReduction,
    check_loss_reduction,
    check_on_unsupported,
)
from pycoherence.sites import gathered
from pycoherence.tables import Printed, plain, table


@dataclass(frozen=True)
class Verification(Printed):
    """How far the capture was from plain autograd, by parameter.

    `print` shows a table, the largest errors first.

    Attributes:
        sq_norms: Largest error of a per-example squared norm over the largest such norm.
        gradient: Norm of the error of the gradient's sum over the sum of the per-example norms.
        rtol: The largest error that was allowed.
    """

    sq_norms: Mapping[str, float]
    gradient: Mapping[str, float]
    rtol: float

    @property
    def failures(self) -> list[str]:
        """Names of the parameters beyond `rtol`; NaN where both sides have it is no error."""
        worst = {name: (self.sq_norms[name], self.gradient[name]) for name in self.sq_norms}
        return [name for name, errors in worst.items() if not all(e <= self.rtol for e in errors)]

    def __repr__(self) -> str:
        n = len(self.sq_norms)
        return f"Verification(parameters={n}, failures={len(self.failures)}, rtol={self.rtol:.1e})"

    def __str__(self) -> str:
        errors = {name: (norm, self.gradient[name]) for name, norm in self.sq_norms.items()}
        # NaN, which is no number, is the worst.
        largest = {name: max(math.inf if e != e else e for e in es) for name, es in errors.items()}
        worst = sorted(errors, key=lambda name: -largest[name])
        failed = len(self.failures)
        found = f"{failed} of {len(errors)} parameters beyond" if failed else "all within"
        return table(
            f"Verification: {found} {self.rtol:.1e}",
            ("sq_norms", "gradient"),
            {"": {name: errors[name] for name in worst}},
            lambda each: [f"{e:.1e}" for e in each],
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, which `json` can write."""
        found = {"sq_norms": self.sq_norms, "gradient": self.gradient, "rtol": self.rtol}
        return plain({**found, "failures": self.failures})


def verify(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    loss_reduction: LossReduction = "mean",
    rtol: float | None = None,
    group_size: int = 1,
    group_by: GroupBy | None = None,
    on_unsupported: Literal["auto", "raise", "vmap"] = "auto",
    group: Group | None = None,
) -> Verification:
    """Compare per-example gradients with those of autograd, one example at a time, on your model.

    It finds what no rule can see from a single layer: examples that are mixed, a batch dimension
    that is not the first, a loss that is not a mean or a sum over examples. The model must be
    deterministic: call `model.eval()` if it has dropout. `.grad` is not touched.

    Args:
        model: Any module.
        loss_fn: `loss_fn(model, batch)` gives the loss of a batch, a scalar; also of one example.
        batch: A small batch: tensors, or tuples, lists and dicts of them. Those whose first
            dimension is the batch size are cut into examples.
        loss_reduction: How `loss_fn` joins per-example losses.
        rtol: Allowed relative error; the square root of the dtype's epsilon if `None`.
        group_size: How many consecutive rows of the batch make one example, as in
            `pycoherence.collect`; `loss_fn` is then also given the rows of one.
        group_by: In place of `group_size`, the example of each row, as in `pycoherence.collect`.
        on_unsupported: `"auto"`, `"raise"` or `"vmap"`, as in `pycoherence.collect`.
        group: The processes that verify together, as in `pycoherence.collect`: each takes its own
            batch, of one or more examples, and all raise if one would. The errors are the largest
            over all of them. Statistics that the processes make together are not compared.

    Returns:
        The errors found, by parameter.

    Raises:
        ValueError: The batch is empty, or `group_size` less than one.
        TypeError: `group_size` is not an integer.
        VerificationError: An error is larger than `rtol`; the message lists the parameters. Or no
            tensor of the batch has the rows of the examples that the capture has found.
        RuntimeError: See `pycoherence.collect`, with `group`.
        RanksError: Another process of `group` has raised an error, or has other parameters.
        UnsupportedError: See `pycoherence.collect`; or `torch.distributed.fsdp.fully_shard`
            has sharded the model.

    Cost: One forward and backward pass for each example; memory of two gradients.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(3, 2)
        >>> result = pc.verify(model, lambda model, x: model(x).square().sum(), torch.ones(4, 3),
        ...                    loss_reduction="sum")
        >>> result.failures
        []
    """
    check_loss_reduction(loss_reduction)
    ranks = ranks_of(group)
    with nullcontext() if ranks is None else ranks.conversation():
        grouping = check_grouping(group_size, group_by)
        found = _compare(model, loss_fn, batch, loss_reduction, grouping, on_unsupported)
        norms, gradients = ({n: each[i] for n, each in found.items()} for i in range(2))
        if ranks is not None:
            ranks.step(f"verify {', '.join(found)}")
            errors = torch.tensor(list(found.values()), dtype=torch.float64)
            norms, gradients = (
                dict(zip(found, column, strict=True)) for column in ranks.largest(errors).T.tolist()
            )
    dtypes = {p.dtype for p in tracked_parameters(model).values()}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    result = Verification(norms, gradients, rounding**0.5 if rtol is None else rtol)
    if result.failures:
        raise VerificationError(_message(result))
    return result


def _compare(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    loss_reduction: LossReduction,
    grouping: Grouping,
    on_unsupported: Any,
) -> dict[str, tuple[float, float]]:
    """The errors of squared norms and of the gradient, by parameter."""
    parameters = tracked_parameters(model)
    check_not_sharded(
        model,
        "verify takes example by example, and all processes would have to take equally many. "
        "What to do: verify the model before fully_shard.",
    )
    fallback = check_on_unsupported(on_unsupported, skip=False)
    groups, sums, norms = measure(model, loss_fn, batch, grouping, fallback)
    size = groups.count
    if not size:
        raise ValueError("expected a batch of one or more examples, got an empty one")
    _expect_rows(batch, groups)
    scale = size if loss_reduction == "mean" else 1
    is_mean = loss_reduction == "mean"
    with without_sync(model):
        true_norms, true_sums = _one_at_a_time(
            model, loss_fn, batch, groups, parameters, is_mean=is_mean
        )

    floor = _largest(torch.stack(list(true_norms.values())).sum(0))
    found: dict[str, tuple[float, float]] = {}
    for name, parameter in parameters.items():
        # A gradient that is zero up to rounding is compared with the whole network's.
        largest = _largest(true_norms[name])
        unit = largest.maximum(floor * torch.finfo(parameter.dtype).eps)
        ours = norms[name].double().cpu() * scale**2 if name in norms else torch.zeros(size)
        norm_error = _relative(_difference(ours, true_norms[name]).abs().max(), unit)
        sum_ours = torch.zeros_like(true_sums[name])
        if name in sums:
            sum_ours = gathered(sums[name]).double() * scale
        error = torch.linalg.vector_norm(_difference(sum_ours, true_sums[name])).cpu()
        found[name] = norm_error, _relative(error, size * unit.sqrt())
    return found


def _expect_rows(batch: Any, groups: Groups) -> None:
    """Raise unless a tensor of the batch has the rows that the capture found examples in."""
    rows = [len(x) for x in tree_flatten(batch)[0] if isinstance(x, Tensor) and x.dim()]
    if rows and groups.rows not in rows:
        found = ", ".join(map(str, sorted(set(rows))))
        raise VerificationError(
            f"the capture found {groups.count} examples, but the tensors of the batch have {found} "
            "rows, which cannot be cut into these. Likely causes: the batch is not the first "
            "dimension of the inputs, or the model makes one row for all examples before any layer "
            "has met them; say with pc.mark_examples where the examples are, and give verify a "
            "batch whose first dimension they are."
        )


def _one_at_a_time(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    groups: Groups,
    parameters: Mapping[str, nn.Parameter],
    *,
    is_mean: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared norms `[B]` and the gradients' sum of each parameter, in float64."""
    # torch 2.13 gives wrong gradients for BatchNorm in eval mode of one example whose gradient is
    # transposed; of two equal ones they are right.
    doubled = any(isinstance(module, _BatchNorm) for module in model.modules())
    norms = {name: torch.zeros(groups.count, dtype=torch.float64) for name in parameters}
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float64, device=p.device)
        for name, p in parameters.items()
    }
    for b in range(groups.count):
        part = groups.members(b, 2 if doubled else 1)
        example = tree_map(lambda x, part=part: _cut(x, part, groups.rows), batch)
        with torch.enable_grad():
            loss = loss_fn(model, example)
        if doubled and not is_mean:
            loss = loss / 2
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                whole = gathered(grad).double()
                norms[name][b] = whole.square().sum()
                sums[name] += whole
    return norms, sums


def _cut(leaf: Any, part: Tensor, rows: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != rows:
        return leaf
    return leaf[part.to(leaf.device)]


def _difference(ours: Tensor, truth: Tensor) -> Tensor:
    return (ours - truth).masked_fill((ours == truth) | (ours.isnan() & truth.isnan()), 0)


def _largest(norms: Tensor) -> Tensor:
    return norms.masked_fill(~norms.isfinite(), 0).max()


def _relative(error: Tensor, unit: Tensor) -> float:
    return 0.0 if error == 0 else (error / unit).item()


def _message(result: Verification) -> str:
    lines = [
        f"  {name}: squared norms off by {result.sq_norms[name]:.1e}, "
        f"gradient by {result.gradient[name]:.1e}"
        for name in result.failures
    ]
    return "\n".join(
        [
            f"per-example gradients differ from one-example-at-a-time autograd by more than "
            f"{result.rtol:.1e} (relative) in {len(lines)} of {len(result.sq_norms)} parameters:",
            *lines,
            "Likely causes: dropout or other randomness (call model.eval()), a layer that mixes "
            "examples, a first dimension that is not the batch, or a loss that is not the "
            "loss_reduction over examples (ignore_index and class weights divide by another number "
            "than B: take the mean within each example, then over the batch).",
        ]
    )
