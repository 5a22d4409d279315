"""A forward and backward pass that only fills probes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pycoherence.capture._backward import guarded
from pycoherence.capture._capture import Capture
from pycoherence.capture.batch_norm import check_batch_norm

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)`: the loss of a batch, a scalar."""


def run_pass(capture: Capture, model: nn.Module, loss_fn: LossFn, batch: Any) -> int:
    """Give the probes of a fresh capture their gradients; those of the model are left alone.

    Returns:
        The batch size.

    Raises:
        ValueError: The loss is not a scalar, or does not use the model.
        UnsupportedError: As in `pycoherence.collect`.
    """
    check_batch_norm(model)
    with torch.enable_grad(), capture:
        loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"expected loss_fn to return a scalar tensor, got {_describe(loss)}")
    if capture.batch_size is None:
        raise ValueError(
            "expected loss_fn to use the parameters of the model, got no use; run the model with "
            "gradients enabled, and give activation checkpointing use_reentrant=False"
        )
    probes = [probe for outputs in capture.probes.values() for probe in outputs.values()]
    grads = guarded(capture, torch.autograd.grad, (loss, probes), {"allow_unused": True}, keep=True)
    capture.forget()
    for probe, grad in zip(probes, grads, strict=True):
        probe.grad = grad
    return capture.batch_size


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
