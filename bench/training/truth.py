"""The truth of statistics in training: autograd, one example at a time, and statistics in float64.

All examples share the forward pass of the batch: in a pass of their own, or in float64, now and
then a ReLU whose input is almost zero falls on the other side, and the gradient is another.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shared.tasks import Task, coordinates, gradient_at

Outputs = dict[str, Tensor]
"""Statistics by name."""

FIRST = 16
"""The number of examples that keep their whole gradients, for dot products."""

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Allowed error over the largest value, by dtype; for sign sums, allowed share of wrong signs."""


class Truth(NamedTuple):
    """Statistics of the examples' own gradients.

    Attributes:
        outputs: By name; `gram` and `dots` (with the mean gradient) are of the first examples only,
            aggregates at some coordinates.
        batch: Number of examples.
    """

    outputs: Outputs
    batch: int

    @classmethod
    def of(cls, task: Task) -> "Truth":
        """The truth of a task, whose model keeps its gradients."""
        batch, rows, norms = len(task.y), [], []
        parameters = list(task.model.parameters())
        size = sum(p.numel() for p in parameters)
        some, values = coordinates(parameters), []
        zeros = task.y.new_zeros(size, dtype=torch.float64)
        total, squares, signs = (zeros.clone() for _ in range(3))
        for b, loss in enumerate(task.losses()):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            values.append(gradient_at(some, grads).double())
            row = torch.cat([grad.flatten() for grad in grads]).double()
            norms.append(row.square().sum())
            total += row
            squares += row.square()
            signs += row.sign()
            rows += [row] if b < FIRST else []
        kept = torch.stack(rows)
        outputs = {
            "sq_norms": torch.stack(norms),
            "gram": kept @ kept.T,
            "dots": kept @ (total / batch),
            "second_moment": squares / batch,
            "sign_sum": signs,
            **_aggregates(torch.stack(values), torch.stack(norms).sqrt()),
        }
        return cls(outputs, batch)

    def error(self, ours: Outputs) -> float:
        """The worst error of what was measured."""
        return max((self._error(name, value) for name, value in ours.items()), default=0.0)

    def _error(self, name: str, ours: Tensor) -> float:
        truth, ours = self.outputs[name], ours.double()
        if name == "gram":
            ours = ours[: len(truth), : len(truth)]
        if name == "dots":
            ours = ours[: len(truth)]
        if ours.shape != truth.shape or not ours.isfinite().all():
            return math.inf
        if name == "sign_sum":
            return (ours - truth).abs().sum().item() / (2 * self.batch * truth.numel())
        return ((ours - truth).abs().max() / truth.abs().max()).item()


def _aggregates(values: Tensor, norms: Tensor) -> Outputs:
    """The aggregates of `cases.py`, from values `[B, N]` of examples with these norms."""
    ordered = values.sort(dim=0).values
    means = torch.stack([group.mean(0) for group in values.tensor_split(3)])
    return {
        "winsorized": values.clamp(ordered[2], ordered[-3]).mean(0),
        "median_of_means": means.median(dim=0).values,
        "norm_clip": (values * (1 / norms).clamp(max=1).unsqueeze(1)).mean(0),
    }
