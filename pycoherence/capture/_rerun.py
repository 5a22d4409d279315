"""Layers that are run again in the backward pass: activation checkpointing.

The mode has to be active there as it was in the forward pass. The functions that start a backward
pass step out of it, since they ask modes themselves; so the engine is called as they would.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable, _make_grads
from torch.overrides import TorchFunctionMode


def are_saved_otherwise() -> bool:
    """Whether tensors for the backward pass are not kept as they are, but perhaps made again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore
    return hooks(False) is not None


def saved_as_they_are() -> AbstractContextManager[Any]:
    """A context in which tensors for the backward pass are kept."""
    if not are_saved_otherwise():
        return nullcontext()
    # Kept with its graph, an output would hold itself.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)


@contextmanager
def active(mode: TorchFunctionMode) -> Iterator[None]:
    """Have a mode see torch functions again that it has stepped out of."""
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def run_engine(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode
) -> Any:
    """What a function that starts a backward pass does, with a mode active in the pass."""
    bound = signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    outputs, given, keep_graph, create_graph, *_ = _named(bound.arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    given = (given,) if given is None or isinstance(given, Tensor) else tuple(given)
    grads = _make_grads(outputs, given * (len(outputs) // len(given)), is_grads_batched=False)
    keep_graph = create_graph if keep_graph is None else keep_graph
    run = Variable._execution_engine.run_backward
    if func is not torch.autograd.grad:
        with active(mode):
            run(outputs, grads, keep_graph, create_graph, (), True, True)
        return None
    options = bound.arguments
    if options["is_grads_batched"]:
        raise RuntimeError("is_grads_batched=True and layers that are run again do not go together")
    inputs, unused = options["inputs"], options["allow_unused"]
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    zeros = options["materialize_grads"]
    unused = zeros if unused is None else unused
    with active(mode):
        found = run(outputs, grads, keep_graph, create_graph, inputs, unused, False)
    if not zeros:
        return found
    pairs = zip(found, inputs, strict=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)


def _named(options: dict[str, Any]) -> tuple[Any, ...]:
    names = (("self", "tensors", "outputs"), ("gradient", "grad_tensors", "grad_outputs"))
    ahead = [options[name] for group in names for name in group if name in options]
    return (*ahead, options["retain_graph"], options["create_graph"])
