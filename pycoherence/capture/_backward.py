"""The backward passes of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycoherence.capture._names import unsupported
from pycoherence.capture._origins import tensors
from pycoherence.capture._rerun import run_engine

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture

BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
"""What starts one."""


def run_backward(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function that starts a backward pass, and guard it."""
    accumulate = func is not torch.autograd.grad
    if accumulate and kwargs.get("inputs") is not None:
        raise RuntimeError(
            "backward(inputs=...) would leave the statistics out, whose probes are not among "
            "these inputs; call loss.backward(), or torch.autograd.grad for other gradients"
        )
    if not accumulate:
        _check_inputs(capture, args[1] if len(args) > 1 else kwargs.get("inputs"))
    if capture.watch.running:
        return guarded(capture, func, args, kwargs)
    if accumulate:
        capture.scaled.read()
    # A gradient that is made after the pass has no part in torch.autograd.grad.
    with capture.around(capture) if accumulate or capture.plan.gradients else nullcontext():
        return guarded(capture, func, args, kwargs)


def guarded(
    capture: Capture,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    keep: bool = False,
) -> Any:
    """Call a function that starts a backward pass, after a check that it will miss nothing."""
    roots = tensors(args[0] if args else list(kwargs.values()))
    accumulate = func is not torch.autograd.grad
    with capture.watch.backward(roots, accumulate=accumulate, keep=keep) as reruns:
        return run_engine(func, args, kwargs, capture) if reruns else func(*args, **kwargs)


def _check_inputs(capture: Capture, inputs: Any) -> None:
    """Refuse `torch.autograd.grad` of parameters where it cannot be exact."""
    names = [name for x in tensors(inputs) for name in capture.names_of(x)]
    if names and capture.watch.running:
        raise unsupported(
            names,
            None,
            "its gradient is taken inside a backward pass, past the capture",
            "leave functions that do so out of the block",
        )
    if names and not capture.plan.gradients:
        raise RuntimeError(
            f"torch.autograd.grad cannot give the gradients of {', '.join(names)}, which are "
            "made of all layers together after the backward pass; call loss.backward()"
        )
