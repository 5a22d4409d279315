"""Batches large enough for every rule, and one pass with a rule."""

from typing import Any

import torch
from torch import Tensor, nn

import pycoherence as pc
from support.models import Batch, classification, labels_for, make
from support.oracle import per_example_gradients

B = 11


def larger(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A model of `models.MODELS`, and a batch of `B` examples of different sizes for it."""
    model, _ = make(name, dtype)
    torch.manual_seed(seed)
    inputs = torch.cat([model.inputs() for _ in range(3)])[:B]
    labels = labels_for(model, inputs)
    if inputs.is_floating_point():
        scale = torch.linspace(0.2, 2, B).view(-1, *[1] * (inputs.dim() - 1))
        inputs = (inputs * scale).to(dtype)
    return model, (inputs, labels)


def aggregated(
    model: nn.Module, batch: Batch, rule: Any, reduction: Any = "mean", **options: Any
) -> tuple[dict[str, Tensor], pc.Report]:
    """What `.grad` holds after a pass, from nothing, and the report."""
    model.zero_grad()
    with pc.aggregate(model, rule, loss_reduction=reduction, **options) as agg:
        classification(reduction)(model, batch).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, agg.report


def gradients(
    model: nn.Module, batch: Batch, reduction: str = "mean", group_size: int = 1
) -> dict[str, Tensor]:
    return per_example_gradients(model, classification(reduction), batch, group_size)


def assert_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    assert list(actual) == list(expected)
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():
        assert actual[name].shape == x.shape
        assert not actual[name].requires_grad
        error = (actual[name].double() - x).abs().max().item()
        assert error <= tolerance * largest, f"{name}: off by {error / largest:.2g}"
