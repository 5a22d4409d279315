"""A forward and backward pass that measures, and leaves the model's gradients alone."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycoherence.capture.mode import Capture
from pycoherence.capture.model import check_batch_norm
from pycoherence.capture.wrappers import without_sync

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)`: the loss of a batch, a scalar."""


def run_pass(capture: Capture, model: nn.Module, loss_fn: LossFn, batch: Any) -> int:
    """Fill the results of a fresh capture; the gradients of the model are left alone.

    Returns:
        The batch size.

    Raises:
        ValueError: The loss is not a scalar, or does not use the model.
        UnsupportedError: See `pycoherence.collect`.
    """
    with nullcontext() if capture.across is None else capture.across.ranks.conversation():
        return _run(capture, model, loss_fn, batch)


def _run(capture: Capture, model: nn.Module, loss_fn: LossFn, batch: Any) -> int:
    check_batch_norm(model)
    # A wrapper that waits for gradients of this pass would wait for ever.
    synced = dist.is_available() and dist.is_initialized()
    with without_sync(model) if synced else nullcontext(), torch.enable_grad(), capture:
        loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"expected loss_fn to return a scalar tensor, got {_describe(loss)}")
    results = capture.results
    if results.batch_size is None and not capture.passes.is_single:
        raise ValueError(
            "expected loss_fn to use the parameters of the model, got no use; run the model with "
            "gradients enabled, and give activation checkpointing use_reentrant=False"
        )
    names = results.measured or [n for n in capture.parameters if n not in results.skipped]
    leaves = [capture.passes.leaves[name] for name in sorted(names)]
    capture.measure(loss, leaves)
    capture.forget()
    assert results.batch_size is not None
    return results.batch_size


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
