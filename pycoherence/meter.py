"""The coherence of a sample that is larger than a batch."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pycoherence.capture import (
    Capture,
    GroupBy,
    Grouping,
    Groups,
    LossFn,
    OnUnsupported,
    Request,
    check_grouping,
    lasting_parameters,
    like_parameter,
    per_example,
    run_pass,
    tracked_parameters,
)
from pycoherence.ranks import Group, Ranks, ranks_of
from pycoherence.record import (
    LossReduction,
    check_loss_reduction,
    check_on_unsupported,
)
from pycoherence.sites import gathered
from pycoherence.statistics import Coherence


class CoherenceMeter:
    r"""Streams over the batches of a sample, at fixed weights, and gives its coherence.

    .. math:: S = \sum_i g_i, \quad Q = \sum_i \lVert g_i \rVert^2, \quad m = \lVert S \rVert^2 / Q

    Both are kept in float64, for each parameter. Batches may have any sizes; up to rounding, the
    result does not depend on how the sample was split, nor with `all_reduce` on the number of
    processes that take its parts. The model and its `.grad` stay untouched.

    Args:
        model: The model whose parameters (those that require a gradient) are measured.
        loss_reduction: How `loss_fn` joins per-example losses, `"mean"` or `"sum"`.
        group_size: How many consecutive rows of a batch make one example, as in
            `pycoherence.collect`.
        on_unsupported: `"auto"`, `"raise"` or `"vmap"`, as in `pycoherence.collect`.

    Raises:
        ValueError: No parameter to track, or an unknown `loss_reduction` or `group_size`.

    Cost: For each batch one forward and backward pass; memory of two gradients in float64.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217; 2022, arXiv:2203.10036.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> meter = pc.CoherenceMeter(model)
        >>> for x in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])):
        ...     meter.update(lambda model, x: model(x).mean(), x)
        >>> meter.compute().m  # S = (1, 2), Q = 3
        1.6666666666666667
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: LossReduction = "mean",
        group_size: int = 1,
        on_unsupported: Literal["auto", "raise", "vmap"] = "auto",
    ) -> None:
        check_loss_reduction(loss_reduction)
        self._model = model
        self._loss_reduction = loss_reduction
        self._group_size = check_grouping(group_size, None).size
        self._on_unsupported: OnUnsupported = check_on_unsupported(on_unsupported, skip=False)
        self.reset()

    def reset(self) -> None:
        """Forget all batches; needed when the weights, or which of them are trained, changed."""
        self._parameters = tracked_parameters(self._model)
        self._n = 0
        self._sums = {name: _zeros(p, p.shape) for name, p in self._parameters.items()}
        self._totals = {name: _zeros(p, ()) for name, p in self._parameters.items()}
        self._versions: dict[str, tuple[int, bool]] | None = None
        self._point: dict[str, Tensor] | None = None
        self._shards: dict[str, Tensor] | None = None  # no other process has the same ones

    def __repr__(self) -> str:
        return f"CoherenceMeter(n={self._n}, parameters={len(self._parameters)})"

    @property
    def n(self) -> int:
        """Number of examples so far."""
        return self._n

    def update(self, loss_fn: LossFn, batch: Any, *, group_by: GroupBy | None = None) -> None:
        """Add a batch.

        Args:
            loss_fn: `loss_fn(model, batch)` gives the loss of the batch, a scalar tensor.
            batch: Passed on as it is.
            group_by: The example of each row of this batch, as in `pycoherence.collect`, for a
                meter without `group_size`.

        Raises:
            RuntimeError: The weights, or which of them are trained, have changed since the first
                batch.
            ValueError: The loss is not a scalar, or does not use the model; or the numbers of
                `group_by` do not name examples.
            TypeError: `group_by` holds something else than integers.
            UnsupportedError: See `pycoherence.collect`.
        """
        if self._n == 0:
            self.reset()
        parameters = lasting_parameters(self._model)
        versions = {name: (p._version, p.requires_grad) for name, p in parameters.items()}
        point, shards = _samples(parameters)
        agree = _agree(self._point, point) and _agree(self._shards, shards)
        if self._versions not in (None, versions) or not agree:
            raise RuntimeError(
                "the weights have changed since the meter's first batch, but coherence belongs to "
                "one point; call reset() first"
            )
        grouping = check_grouping(self._group_size, group_by)
        groups, sums, norms = measure(self._model, loss_fn, batch, grouping, self._on_unsupported)
        batch_size = groups.count
        scale = batch_size if self._loss_reduction == "mean" else 1
        for name, gradient in sums.items():
            self._sums[name].add_(gathered(gradient), alpha=scale)  # in float64, without a copy
            self._totals[name] += norms[name].double().sum() * scale**2
        self._n += batch_size
        self._versions, self._point, self._shards = versions, point, shards

    def compute(self) -> Coherence:
        """The coherence of all examples so far.

        Raises:
            RuntimeError: There are none.
        """
        if self._n == 0:
            raise RuntimeError("the meter has seen no example; call update(loss_fn, batch) first")
        parts = {
            name: (s.square().sum().item(), self._totals[name].item())
            for name, s in self._sums.items()
        }
        return Coherence.of(parts, self._n)

    def merge(self, other: "CoherenceMeter") -> None:
        """Add the examples of another meter on the same weights, from another process say.

        Raises:
            ValueError: The meters track different parameters, or different values of them, or
                differ in what an example is.
        """
        self._add(other.state_dict())

    def all_reduce(self, group: Group) -> None:
        r"""Add the examples of the meters of other processes at the same weights.

        .. math:: S = \sum_r S_r, \quad Q = \sum_r Q_r, \quad n = \sum_r n_r

        All processes call it together, once, when each has its batches, as many as it has, or none.
        Afterwards the meter of each has the examples of all: a second call, or further batches
        before one, would count them once for each process. `reset` begins anew. A model that
        `fully_shard` has sharded sends in its forward pass: there all call `update` equally often,
        with empty batches where they have none.

        Args:
            group: The processes, a `torch.distributed.ProcessGroup` or a `DeviceMesh`.

        Raises:
            TypeError: It is neither.
            RuntimeError: `torch.distributed` has no process groups yet, or this process is not in
                `group`.
            ValueError: The meters are at different weights, as far as up to 127 values of each
                parameter tell, and none of those that `fully_shard` has sharded; on all processes.
            RanksError: They track different parameters, or differ in `group_size`; or another
                process has raised an error.

        Cost: One sum over the processes of a float64 number for each of the model's, as much as the
        average of gradients in float64.
        """
        ranks = ranks_of(group)
        if ranks is None:
            raise TypeError("expected a process group or a DeviceMesh, got None")
        with ranks.conversation():
            self._add_all(ranks)

    def _add_all(self, ranks: Ranks) -> None:
        shapes = {name: tuple(s.shape) for name, s in self._sums.items()}
        said = ranks.step(f"a meter of {shapes}, group_size={self._group_size}", [self._n])
        sizes = [n for (n,) in said]
        if not any(sizes):
            return
        first = next(rank for rank, n in enumerate(sizes) if n)
        point = _samples(lasting_parameters(self._model))[0] if self._point is None else self._point
        shared = {name: ranks.from_rank(first, x) for name, x in point.items()}
        agree = ranks.step("whether the weights agree", [_agree(point, shared)])
        if not all(one for (one,) in agree):
            others = [rank for rank, (one,) in enumerate(agree) if not one]
            raise ValueError(
                f"expected meters at the same weights, got others on ranks {others} than on rank "
                f"{first}; coherence belongs to one point"
            )
        self._sums = {name: ranks.total(s) for name, s in self._sums.items()}
        self._totals = {name: ranks.total(total) for name, total in self._totals.items()}
        self._n, self._point = sum(sizes), point

    def state_dict(self) -> dict[str, Any]:
        """All that has been accumulated, as tensors and numbers."""
        sums = {name: s.clone() for name, s in self._sums.items()}
        totals = {name: total.clone() for name, total in self._totals.items()}
        return {
            "n": self._n,
            "group_size": self._group_size,
            "sums": sums,
            "totals": totals,
            "point": self._point,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what has been accumulated by what `state_dict` gave.

        Raises:
            ValueError: The state tracks different parameters, or other groups.
        """
        self._check_state(state)
        self.reset()
        self._add(state)

    def _add(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        if not _agree(self._point, state["point"]):
            raise ValueError(
                "expected the state of a meter at the same weights, got one at others; coherence "
                "belongs to one point"
            )
        self._point = self._point or state["point"]
        for name, s in self._sums.items():
            self._sums[name] = s + state["sums"][name].to(s.device)
            self._totals[name] = self._totals[name] + state["totals"][name].to(s.device)
        self._n += state["n"]

    def _check_state(self, state: dict[str, Any]) -> None:
        theirs = {name: tuple(s.shape) for name, s in state["sums"].items()}
        ours = {name: tuple(s.shape) for name, s in self._sums.items()}
        if theirs != ours:
            names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
            raise ValueError(
                f"expected the state of a meter on the same parameters, got another; they differ "
                f"in {', '.join(names)}"
            )
        if state["group_size"] != self._group_size:
            raise ValueError(
                f"expected the state of a meter with group_size={self._group_size}, got one with "
                f"group_size={state['group_size']}, whose examples are others"
            )


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    grouping: Grouping,
    on_unsupported: OnUnsupported = "auto",
) -> tuple[Groups, dict[str, Tensor], dict[str, Tensor]]:
    """One forward and backward pass, which leaves `.grad` alone.

    Returns:
        The rows and the examples that they make; for each parameter that took part, the sum over
        examples of their gradients, in accumulation dtype, and their squared norms `[B]`, both of
        the loss as it is.
    """
    outputs = {"weighted_sum": like_parameter, "sq_norms": per_example}
    request = Request(outputs, gradients=False, grouping=grouping, on_unsupported=on_unsupported)
    capture = Capture(model, tracked_parameters(model), request)
    batch_size = run_pass(capture, model, loss_fn, batch)
    found = capture.results.outputs
    sums, norms = ({name: each[o] for name, each in found.items()} for o in outputs)
    single = capture.count is None  # a batch of one row, which needs no captured call
    return Grouping().groups(batch_size) if single else capture.groups, sums, norms


def _samples(parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Some values, since some optimizers, and writes through `.data`, leave no new version.

    Returns:
        Those of parameters that this process holds, and those of its shards of others.
    """
    local = {name: getattr(p, "to_local", None) for name, p in parameters.items()}  # of a DTensor
    whole = {name: _sample(p) for name, p in parameters.items() if local[name] is None}
    shards = {name: _sample(own()) for name, own in local.items() if own is not None}
    return whole, shards


def _sample(x: Tensor) -> Tensor:
    return x.detach().flatten()[:: max(1, x.numel() // 64)].cpu().clone()


def _agree(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    """Whether two points are the same as far as is known."""
    if a is None or b is None:
        return True
    return a.keys() == b.keys() and all(
        x.shape == b[name].shape and torch.allclose(x, b[name], 0, 0, equal_nan=True)
        for name, x in a.items()
    )


def _zeros(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=parameter.device)
