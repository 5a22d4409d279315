"""The least that a capture in Python can take: Functions that do nothing but what they must.

Each layer is replaced by a custom autograd Function with the same kernels, which keeps no facts,
guards no pass and knows its layer beforehand. An empty function mode stands for the one that finds
the layers.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.shared.tasks import Task
from pycoherence.sites import AffineSite, EmbeddingSite, LinearSite, Site

_WANT = ("sq_norms", "weighted_sum")


class _Layer(torch.autograd.Function):
    """Squared norms go into a list, gradients to the parameters."""

    @staticmethod
    def gradients(found: list[Tensor], *sites: Site) -> list[Tensor | None]:
        reduced = [site.reduce(_WANT) for site in sites]
        found += [r.sq_norms for r in reduced if r.sq_norms is not None]
        return [r.weighted_sum for r in reduced]


class _Linear(_Layer):
    @staticmethod
    def forward(
        ctx: Any, found: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.found, ctx.shifts = found, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        given = g @ weight if ctx.needs_input_grad[1] else None
        x, g = (t.unsqueeze(1) if t.dim() == 2 else t for t in (x, g))
        shift = _Layer.gradients(ctx.found, AffineSite(g)) if ctx.shifts else [None]
        return None, given, *_Layer.gradients(ctx.found, LinearSite(x, g)), *shift


class _LayerNorm(_Layer):
    @staticmethod
    def forward(
        ctx: Any, found: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.found = found
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        given = torch.ops.aten.native_layer_norm_backward.default(
            g, x, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        sites = AffineSite(g, x, mean, rstd), AffineSite(g)
        return None, given, *_Layer.gradients(ctx.found, *sites), None


class _Embedding(_Layer):
    @staticmethod
    def forward(ctx: Any, found: list[Tensor], ids: Tensor, weight: Tensor) -> Tensor:
        ctx.found, ctx.n = found, len(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        return None, None, *_Layer.gradients(ctx.found, EmbeddingSite(ids, g, ctx.n, None))


class Empty(TorchFunctionMode):
    """Only calls what it sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def floor_of(task: Task) -> tuple[Task, list[Tensor]]:
    """The task with its layers replaced, and the list to which each pass adds squared norms."""
    found: list[Tensor] = []
    task = copy.deepcopy(task)
    for module in task.model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: _Linear.apply(found, x, m.weight, m.bias)
        elif isinstance(module, nn.LayerNorm):
            module.forward = lambda x, m=module: _LayerNorm.apply(found, x, m.weight, m.bias, m.eps)
        elif isinstance(module, nn.Embedding):
            module.forward = lambda ids, m=module: _Embedding.apply(found, ids, m.weight)
    return task, found
