"""What must hold of a captured pass on any model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pycoherence as pc
from support.oracle import LossFn, flat, joined, per_example_gradients, sq_norms

Batch = tuple[Tensor, ...]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what is expected; 0 for two zeros."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    error, scale = (torch.linalg.vector_norm(x).item() for x in (actual - expected, expected))
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def grad_of(parameter: Tensor) -> Tensor:
    """Its `.grad`; zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def with_grad(batch: Batch) -> Batch:
    """Floating tensors as leaves that require a gradient."""
    return tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in batch)


def plain_pass(model: nn.Module, loss_fn: LossFn, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the model and the batch, with the gradients of plain autograd."""
    model, batch = copy.deepcopy(model), with_grad(batch)
    loss_fn(model, batch).backward()
    return model, batch


def captured_pass(
    model: nn.Module, loss_fn: LossFn, batch: Batch, reduction: Any = "mean", group_size: int = 1
) -> tuple[nn.Module, Batch, pc.Record]:
    """A copy of model and batch with the gradients of the captured pass, and its record."""
    model, batch = copy.deepcopy(model), with_grad(batch)
    options = {"loss_reduction": reduction, "group_size": group_size}
    with pc.collect(model, pc.SqNorms(), **options) as record:
        loss_fn(model, batch).backward()
    return model, batch, record


def assert_grads_equal(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    """`.grad` of each parameter: there or not, of the same dtype, and the same numbers."""
    for (name, ours), (_, plain) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == (plain.grad is None), name
        if ours.grad is not None and plain.grad is not None:
            assert ours.grad.dtype == plain.grad.dtype, name
            error = relative_error(ours.grad, plain.grad)
            assert error <= tolerance, f"{name}: .grad off by {error:.2g}"


def assert_inputs_equal(actual: Batch, expected: Batch, tolerance: float) -> None:
    """Gradients of the inputs."""
    for ours, plain in zip(actual, expected, strict=True):
        assert (ours.grad is None) == (plain.grad is None)
        if ours.grad is not None and plain.grad is not None:
            assert relative_error(ours.grad, plain.grad) <= tolerance


def assert_norms(record: pc.Record, gradients: dict[str, Tensor], tolerance: float) -> None:
    """Squared norms, per parameter and in total, of each example.

    Those of a parameter are compared with its largest, since an example's own may all but vanish.
    """
    truth = sq_norms(gradients)
    assert list(record.by_parameter) == list(truth)
    ours = {name: one.sq_norms for name, one in record.by_parameter.items()}
    ours["total"], truth["total"] = record.sq_norms, torch.stack([*truth.values()]).sum(0)
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, name
        if expected.numel():
            error = (ours[name].double() - expected).abs().max() / expected.max().clamp_min(1e-300)
            assert error <= tolerance, f"{name}: squared norms off by {error:.2g}"


def assert_gram(record: pc.Record, gradients: dict[str, Tensor], tolerance: float) -> None:
    """Gram matrix per parameter and in total, compared with its largest number."""
    for name, rows in {**flat(gradients), "total": joined(gradients)}.items():
        expected, one = rows @ rows.T, record if name == "total" else record.by_parameter[name]
        error = (one.gram - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
        assert error <= tolerance, f"{name}: Gram off by {error:.2g}"


def assert_sums(
    found: Mapping[str, Tensor], gradients: dict[str, Tensor], coef: Tensor, tolerance: float
) -> None:
    """Sums of the gradients with coefficients, one for each example."""
    assert list(found) == list(gradients)
    for name, g in gradients.items():
        error = relative_error(found[name], torch.tensordot(coef.double(), g.double(), 1))
        assert error <= tolerance, f"{name}: sum off by {error:.2g}"


def assert_coherence(record: pc.Record, gradients: dict[str, Tensor], tolerance: float) -> None:
    """m-coherence per parameter and in total, from the gradients themselves."""
    found = record.coherence()
    for name, rows in {**flat(gradients), "total": joined(gradients)}.items():
        q = rows.square().sum()
        if q > 0:
            part = found if name == "total" else found.by_parameter[name]
            m = (rows.sum(0).square().sum() / q).item()
            assert abs(part.m - m) <= tolerance * len(rows), f"{name}: m {part.m}, not {m}"


NORMS = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADS = {torch.float32: 1e-6, torch.float64: 1e-12}


def assert_exact(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    dtype: torch.dtype,
    reduction: Any = "mean",
    group_size: int = 1,
) -> None:
    """Everything above: norms and coherence by the oracle, gradients by plain autograd."""
    gradients = per_example_gradients(model, loss_fn, batch, group_size)
    plain, plain_batch = plain_pass(model, loss_fn, batch)
    ours, our_batch, record = captured_pass(model, loss_fn, batch, reduction, group_size)
    assert record.batch_size == len(batch[0]) // group_size
    assert_norms(record, gradients, NORMS[dtype])
    assert_coherence(record, gradients, NORMS[dtype])
    assert_grads_equal(ours, plain, GRADS[dtype])
    assert_inputs_equal(our_batch, plain_batch, GRADS[dtype])
