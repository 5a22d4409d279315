"""Functions of one number at a time, of which the parameter is broadcast over the batch."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._general import Function
from pycoherence.capture._moves import FIRST, SECOND
from pycoherence.capture._origins import tensors
from pycoherence.capture._registry import Handler, register_site, register_spreader
from pycoherence.capture._rowwise import batch_first
from pycoherence.sites import AffineSite

_NAMES = ("add", "sub", "mul", "div", "true_divide", "multiply", "subtract", "divide", "pow")
_DUNDERS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_OTHERS = (torch.where, Tensor.where, torch.lerp, Tensor.lerp, torch.addcmul, Tensor.addcmul)


def elementwise(function: Callable[..., Any]) -> Handler:
    """The handler of a function that takes numbers one by one, and broadcasts."""

    def handle(capture: Capture, *args: Any, **kwargs: Any) -> Any:
        if "out" in kwargs:
            return NotImplemented
        run = Function(function, (args, kwargs), lambda x: bool(capture.names_of(x)))
        parameters, others = run.take()
        examples = [x for x in others if not capture.is_alone(x)]
        if len(parameters) != 1 or not examples:
            return NotImplemented
        if capture.layouts.active:
            if SECOND in map(capture.layouts.of, examples):
                return _second(capture, handle, args, kwargs)
            for x in examples:
                capture.layouts.expect(x, FIRST, capture.refuse)
        parameter = parameters[0]
        shapes = [tuple(x.shape) for x in others]
        shape = torch.broadcast_shapes(parameter.shape, *shapes)
        if not shape or all(x.shape[:1] != shape[:1] for x in examples):
            return NotImplemented
        if parameter.dim() == len(shape) and parameter.shape[0] != 1:
            own = capture.own(parameter)
            if own is None and parameter.shape[0] == capture.batch.count:
                itself = any(parameter is p for p in capture.parameters.values())
                own = None if itself else batch_first(capture, parameter, FIRST)
            return NotImplemented if own is None else run([own], others)[0]
        return broadcast(capture, run, parameter, others, shape)

    return handle


def _second(capture: Capture, handle: Handler, args: Any, kwargs: Any) -> Any:
    """Call the handler with the batch first, which is the second dimension of the arguments."""
    dims = max(x.dim() for x in tensors((args, kwargs)))

    def first(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() < dims - 1 or not x.dim():
            return x
        if capture.names_of(x):
            return x if x.dim() < dims else capture.make(lambda p: p.transpose(0, 1), x)
        return x.transpose(0, 1) if x.dim() == dims else x.unsqueeze(1)

    named = [x for x in tensors((args, kwargs)) if capture.names_of(x)]
    if any(x.dim() == dims - 1 and x.dim() and x.shape[0] != 1 for x in named):
        return NotImplemented  # a row for each example
    args, kwargs = tree_map(first, (args, kwargs))
    found = handle(capture, *args, **kwargs)
    if found is NotImplemented:
        return found
    found = found.transpose(0, 1)
    capture.layouts.note(found, SECOND)
    return found


def broadcast(
    capture: Capture,
    run: Function,
    parameter: Tensor,
    others: list[Tensor],
    shape: tuple[int, ...],
) -> Tensor:
    """Call a function of a parameter and tensors of examples, number by number.

    Args:
        capture: Of the pass.
        run: The function.
        parameter: The same for all examples.
        others: The other tensors among its arguments.
        shape: Of the result.
    """
    batched = parameter.new_empty(()).expand(shape if len(shape) > 1 else (*shape, 1))
    capture.folds.copy(others, batched)
    call = capture.call(batched, parameter=parameter)
    return _Broadcast.apply(call, run, shape, parameter, *others, *call.probes)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        run: Function,
        shape: tuple[int, ...],
        parameter: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.run, ctx.shape, ctx.count = run, shape, len(run.others)
        others = inputs[: ctx.count]
        call.save(ctx, parameter, *others)
        (found,) = run([parameter], others)
        return found

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        parameter, *others = saved(ctx)
        needs = [True, *ctx.needs_input_grad[4 : 4 + ctx.count]]
        with torch.enable_grad():
            spread = parameter.detach().expand(ctx.shape)
            inputs = [
                x.detach().requires_grad_(need)
                for x, need in zip((spread, *others), needs, strict=True)
            ]
            (found,) = ctx.run(inputs[:1], inputs[1:])
            grads = iter(
                torch.autograd.grad(
                    found, [x for x in inputs if x.requires_grad], g, allow_unused=True
                )
            )
        found = [next(grads) if need else None for need in needs]
        site = of_broadcast(g.new_zeros(ctx.shape) if found[0] is None else found[0], parameter)
        ours, *probes = ctx.call.gradients(parameter=site)
        return None, None, None, ours, *found[1:], *probes


def of_broadcast(g: Tensor, parameter: Tensor) -> AffineSite:
    """The site of a parameter that was broadcast, from the gradient of what became of it."""
    ahead = g.dim() - parameter.dim()
    sizes = [1] * ahead + list(parameter.shape)
    summed = [d for d in range(1, g.dim()) if sizes[d] == 1 and g.shape[d] != 1]
    kept = [d for d in range(1, g.dim()) if d not in summed]
    ordered = g.permute(0, *summed, *kept)
    channels = prod(g.shape[d] for d in kept)
    return AffineSite(ordered.reshape(len(g), -1, channels), shape=tuple(parameter.shape))


def _in_place(function: Callable[..., Any]) -> Handler:
    handle = elementwise(function)

    def written(capture: Capture, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if capture.names_of(input):
            return NotImplemented
        copy = input.clone()
        capture.layouts.like(copy, input)
        found = handle(capture, copy, *args, **kwargs)
        return found if found is NotImplemented else input.copy_(found)

    return written


def _expand(capture: Capture, input: Tensor, *size: Any, **kwargs: Any) -> Any:
    sizes = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
    if kwargs or not all(isinstance(n, int) for n in sizes):
        return NotImplemented
    return spread(capture, input, list(sizes))


def _repeat(capture: Capture, input: Tensor, *repeats: Any, **kwargs: Any) -> Any:
    times = repeats[0] if len(repeats) == 1 and isinstance(repeats[0], (tuple, list)) else repeats
    if kwargs or not all(isinstance(n, int) for n in times) or any(n != 1 for n in times[1:]):
        return NotImplemented
    return spread(capture, input, [times[0], *[-1] * (len(times) - 1)], copied=True)


def _expand_as(capture: Capture, input: Tensor, other: Tensor) -> Any:
    return spread(capture, input, list(other.shape))


def spread(capture: Capture, input: Tensor, size: list[int], *, copied: bool = False) -> Any:
    """Give each example what is the same for all: `input` with a dimension for the batch."""
    ahead = len(size) - input.dim()
    if ahead < 0 or (copied and ahead > 0 and input.dim() == 0):
        return NotImplemented
    known = [1] * ahead + list(input.shape)
    shape = tuple(k if n == -1 else n for n, k in zip(size, known, strict=True))
    if len(shape) < 2 or known[0] != 1 or shape[0] != (capture.batch.count or shape[0]):
        return NotImplemented
    if capture.batch.count is None and shape[0] == 1:
        return NotImplemented

    def run(x: Tensor) -> Tensor:
        return x.expand(shape).clone()

    function = Function(run, ((input,), {}), lambda x: True)
    function.take()
    found = broadcast(capture, function, input, [], shape)
    capture.layouts.note(found, FIRST)
    return found


for _name in _NAMES:
    for _owner in (torch, Tensor):
        register_site(getattr(_owner, _name))(elementwise(getattr(_owner, _name)))
    _written = getattr(Tensor, f"{_name}_")
    register_site(_written)(_in_place(getattr(Tensor, _name)))
for _name in _DUNDERS:
    _dunder = getattr(Tensor, f"__{_name}__")
    register_site(_dunder)(elementwise(_dunder))
for _name in ("add", "sub", "mul", "truediv"):
    _written = getattr(Tensor, f"__i{_name}__")
    register_site(_written)(_in_place(getattr(Tensor, f"__{_name}__")))
for _function in _OTHERS:
    register_site(_function)(elementwise(_function))
register_spreader(Tensor.expand)(_expand)
register_spreader(Tensor.repeat)(_repeat)
register_spreader(torch.broadcast_to)(_expand)
register_site(Tensor.expand_as)(_expand_as)
