"""The backward passes of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycoherence.capture._names import unsupported
from pycoherence.capture._origins import tensors
from pycoherence.capture._rerun import run_engine

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture
    from pycoherence.capture._watch import Pass

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
    with capture.watch.backward(roots, accumulate=accumulate, keep=keep) as this:
        inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
        is_asked = not accumulate and not keep and _asks_for_all(capture, this, inputs)
        if this.names & capture.asked and (accumulate or is_asked):
            _take_back(capture)
        if is_asked and not kwargs.get("is_grads_batched"):
            return _measured(capture, this, signature(func).bind(*args, **kwargs).arguments)
        return _run(capture, func, args, kwargs)


def _run(
    capture: Capture, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if capture.watch.reruns:
        return run_engine(func, args, kwargs, capture)
    return func(*args, **kwargs)


def _asks_for_all(capture: Capture, this: Pass, inputs: Any) -> bool:
    """Whether the gradients of all parameters that take part are asked for, for the first time."""
    known = {id(x) for x in tensors(inputs)}
    wanted = all(id(capture.parameters[name]) in known for name in this.names)
    is_flat = isinstance(inputs, (Tensor, list, tuple))
    return wanted and is_flat and bool(this.names) and capture.watch.may_measure(this)


def _measured(capture: Capture, this: Pass, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Call `torch.autograd.grad` for the probes too; a later pass may take their place."""
    options = dict(options)
    outputs, inputs = options.pop("outputs"), list(tensors(options.pop("inputs")))
    probes = [probe for name in this.names for probe in capture.probes[name].values()]
    capture.asked |= this.names
    this.keep = True
    try:
        found = _run(capture, torch.autograd.grad, (outputs, [*inputs, *probes]), options)
    except BaseException:
        _take_back(capture)
        raise
    for probe, grad in zip(probes, found[len(inputs) :], strict=True):
        probe.grad = grad.detach()
    return found[: len(inputs)]


def _take_back(capture: Capture) -> None:
    """Forget what `torch.autograd.grad` has measured."""
    kept = capture.kept
    for name in capture.asked:
        for probe in capture.probes[name].values():
            probe.grad = None
        for known in (kept.factors, kept.sum_norms, kept.ordered):
            known.pop(name, None)
    capture.asked.clear()


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
