"""The autograd Function of all captured calls, and what a function has to say of itself."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycoherence.capture.autocast import is_autocast_enabled, without_autocast
from pycoherence.capture.rows import Rows
from pycoherence.capture.sharded import Cuts, sharded_factors
from pycoherence.capture.torch_internals import apply_of
from pycoherence.capture.uses import LayerCall, RunningPass
from pycoherence.errors import UnsupportedError
from pycoherence.sites import Site

Kept = tuple[Tensor | None, ...]
"""The tensors that a rule keeps of a call for its backward pass."""


class LayerRule:
    """A function of examples and parameters, as the factors of each example's gradient.

    Attributes:
        features: How many of the last dimensions of the input are a row; those before are rows,
            each of one example.
        cuts: How factors of a parameter that is distributed over ranks are cut; `None` if nobody
            has said.
    """

    features: int = 1
    cuts: ClassVar[Cuts | None] = None

    def forward(self, x: Any, *parameters: Any) -> tuple[Any, Kept]:
        """Return the result of the function, and the tensors to keep for the methods below."""
        raise NotImplementedError

    def needed(self, kept: Kept, wants: Sequence[bool], inputs: bool) -> Kept:
        """Drop what is not needed of the kept tensors, which then may be changed in place.

        Args:
            kept: The tensors that `forward` gave to keep.
            wants: For each parameter argument, whether its gradient is wanted.
            inputs: Whether that of an input is.
        """
        return kept

    def rows_first(self, g: Any) -> Any:
        """The output gradient, with its rows in the order of those of the input."""
        return g

    def factors(self, rows: Rows, g: Any, *kept: Any) -> Sequence[Site | None]:
        """The site of each parameter argument, in their order, from the output gradient."""
        raise NotImplementedError

    def input_grad(self, g: Any, *kept: Any) -> Tensor | None:
        """The gradient of the input."""
        raise NotImplementedError

    def input_grads(self, needed: Sequence[bool], g: Any, *kept: Any) -> Sequence[Tensor | None]:
        """The gradients of all inputs, of those that need one."""
        return (self.input_grad(g, *kept) if needed[0] else None,)


class CapturedLayer(torch.autograd.Function):
    """Calls a `LayerRule`, whose backward pass gives gradients and statistics together."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, *tensors: Any) -> Any:
        ctx.call = call
        output, kept = call.rule.forward(*tensors[: call.inputs + len(call.arguments)])
        wants = [argument is not None for argument in call.arguments]
        kept = call.rule.needed(kept, wants, True in ctx.needs_input_grad[1 : 1 + call.inputs])
        if type(output) is tuple:
            ctx.mark_non_differentiable(*(x for x in output if not _flows(x)))
        # The mark comes first: it tells checkpointing that ran the layer again unseen.
        ctx.save_for_backward(_mark(), *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _guarded(ctx, *grads)
        return _backward(ctx, *grads)


apply_layer = apply_of(CapturedLayer)
"""Carries out a call: with it, its inputs, its parameters and what these are made of."""


def _backward(ctx: Any, *grads: Any) -> Any:
    call: LayerCall = ctx.call
    this = call.sink.running_pass(call.number)
    mark, *kept = ctx.saved_tensors
    if mark is None or mark.shape != _MARK:
        raise UnsupportedError(
            "activation checkpointing has run a captured layer again where the capture cannot "
            "see it. What to do: call loss.backward() inside the block of the forward pass, or "
            "leave checkpointing out of it."
        )
    if not is_autocast_enabled() and not torch._C._len_torch_function_stack():
        return _gradients(ctx, call, this, grads, kept)
    # Casts have been made in the forward pass, and what runs here is ours.
    with without_autocast(grads), torch._C.DisableTorchFunction():
        return _gradients(ctx, call, this, grads, kept)


def _gradients(ctx: Any, call: LayerCall, this: RunningPass, grads: Any, kept: Any) -> Any:
    rule = call.rule
    g: Any = grads[0] if len(grads) == 1 else grads
    needed = ctx.needs_input_grad[1 : 1 + call.inputs]
    inputs = rule.input_grads(needed, g, *kept) if True in needed else (None,) * call.inputs
    rows = call.rows
    if call.layouts is not None:
        return None, *inputs, *call.gradients(this, sharded_factors(call, call.layouts, g, kept))
    if rows is not None and rows.check is not None:
        rows.check(rule.rows_first(g))
    return None, *inputs, *call.gradients(this, rule.factors(rows, g, *kept))


_guarded = once_differentiable(_backward)


def _flows(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


@functools.cache
def _mark() -> Tensor:
    """A tensor that no torch function would save."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(_MARK, dtype=torch.uint8, device="cpu")


_MARK = (0, 7, 0, 7)
