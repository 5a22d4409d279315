"""Any function of parameters and examples, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pycoherence.capture._autocast import same_autocast, without_autocast
from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._moves import FIRST
from pycoherence.capture._names import function_name
from pycoherence.capture._origins import tensors
from pycoherence.ops._workspace import workspace
from pycoherence.sites import of_rows

if TYPE_CHECKING:
    from pycoherence.capture._capture import Capture


class Function:
    """A torch function of tensors alone.

    Args:
        function: As torch has it.
        arguments: What it is called with.
        is_parameter: Whether a tensor stands for a parameter.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        is_parameter: Callable[[Tensor], bool],
    ) -> None:
        self.function = function
        self._autocast = same_autocast(arguments)
        self.leaves, self.spec = tree_flatten(arguments)
        at = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.parameters = [i for i in at if is_parameter(self.leaves[i])]
        self.others = [i for i in at if i not in self.parameters]
        self.result: TreeSpec | None = None

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters and the other tensors, which are no longer kept here."""
        found = [[self.leaves[i] for i in at] for at in (self.parameters, self.others)]
        for i in (*self.parameters, *self.others):
            self.leaves[i] = None
        return found[0], found[1]

    def __call__(self, parameters: Any, others: Any) -> tuple[Tensor, ...]:
        """The tensors among its results."""
        leaves = list(self.leaves)
        for at, values in ((self.parameters, parameters), (self.others, others)):
            for i, value in zip(at, values, strict=True):
                leaves[i] = value
        args, kwargs = cast(tuple[Any, Any], tree_unflatten(leaves, self.spec))
        with self._autocast():
            found, self.result = tree_flatten(self.function(*args, **kwargs))
        return tuple(found)


def general(capture: Capture, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function through which per-example gradients are taken by `torch.func.vmap`.

    The first dimension of every tensor of its arguments that is the batch's, and of all results,
    is the batch. Everything else is the same for all examples.
    """
    run = Function(function, (args, kwargs), lambda x: bool(capture.names_of(x)))
    parameters, others = run.take()
    for x in others:
        capture.layouts.expect(x, FIRST, capture.refuse)
    rows = capture.batch.among(others, capture.refuse)
    batched = [x.dim() > 0 and x.shape[0] == rows for x in others]
    first = next(x for x, is_batched in zip(others, batched, strict=True) if is_batched)
    slots = {f"parameter{i}": p for i, p in enumerate(parameters)}
    with without_autocast(first):
        call = capture.call(first if first.dim() > 1 else first.unsqueeze(1), **slots)
    name = function_name(function)
    for used in call.names:
        capture.fallbacks.setdefault(used, f"{name}: gradients [B, ...] by torch.func.vmap")
    found = _General.apply(call, run, batched, len(parameters), *parameters, *others, *call.probes)
    for x in tensors(found):
        if x.dim() == 0 or x.shape[0] != rows:
            capture.refuse(
                f"its result {tuple(x.shape)} does not have the {rows} rows of the batch first",
                "keep the batch first, or freeze the parameter with requires_grad_(False)",
            )
    assert run.result is not None
    return tree_unflatten(list(found), run.result)


class _General(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, run: Function, batched: list[bool], count: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.batched, ctx.count = run, batched, count
        used = inputs[: count + len(batched)]
        call.save(ctx, *used)
        found = run(used[:count], used[count:])
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return tuple(x.clone() if any(x is y for y in used) or x._is_view() else x for x in found)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        used = saved(ctx)
        parameters, others = used[: ctx.count], used[ctx.count :]
        needed = [i for i in range(len(others)) if ctx.needs_input_grad[4 + ctx.count + i]]
        input_grads: list[Tensor | None] = [None] * len(others)
        found = _of_inputs(ctx.run, parameters, others, needed, grads)
        for i, grad in zip(needed, found, strict=True):
            input_grads[i] = grad
        rows = _of_parameters(ctx.run, parameters, others, ctx.batched, grads)
        sites = {f"parameter{i}": of_rows(r) for i, r in enumerate(rows)}
        ours = ctx.call.gradients(**sites)
        return None, None, None, None, *ours[: ctx.count], *input_grads, *ours[ctx.count :]


def _of_inputs(
    run: Function,
    parameters: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    needed: list[int],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    if not needed:
        return ()
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(others)]
        found = run([p.detach() for p in parameters], inputs)
        pairs = [(x, g) for x, g in zip(found, grads, strict=True) if x.requires_grad]
        outputs, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, [inputs[i] for i in needed], weights, allow_unused=True)


def _of_parameters(
    run: Function,
    parameters: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    batched: list[bool],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The gradients of the examples, `[B, *shape]` of each parameter."""

    def one(others: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        alone = [x.unsqueeze(0) if b else x for x, b in zip(others, batched, strict=True)]

        def outputs(*parameters: Tensor) -> tuple[Tensor, ...]:
            return tuple(x for x in run(parameters, alone) if x.is_floating_point())

        pull = torch.func.vjp(outputs, *parameters)[1]
        return pull(tuple(g.unsqueeze(0) for g in grads))

    floating = tuple(g for g in grads if g is not None and g.is_floating_point())
    step = max(1, workspace() // max(1, sum(p.numel() * p.itemsize for p in parameters)))
    dims = tuple(0 if b else None for b in batched)
    return torch.func.vmap(one, in_dims=(dims, 0), chunk_size=step)(others, floating)
