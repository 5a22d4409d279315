"""`torch.nn.functional.layer_norm`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._layouts import either_way
from pycoherence.capture._registry import register_site
from pycoherence.sites import AffineSite
from pycoherence.sites._site import positions_last


@register_site(F.layer_norm)
@either_way
def layer_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if len(normalized_shape) >= input.dim():
        capture.refuse(
            f"its input {tuple(input.shape)} has no batch dimension before those it normalises",
            "give it an input [B, ...]",
        )
    call = capture.call(input, weight=weight, bias=bias)
    return _LayerNorm.apply(call, list(normalized_shape), eps, input, weight, bias, *call.probes)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        shape: list[int],
        eps: float,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *probes: Tensor,
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.shape = shape
        call.save(ctx, input, mean, rstd, weight, bias)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, rstd, weight, bias = saved(ctx)
        input_grad = None
        if ctx.needs_input_grad[3]:
            input_grad = torch.ops.aten.native_layer_norm_backward(
                g, input, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        g, x, mean, rstd = (
            positions_last(s.flatten(-len(ctx.shape))) for s in (g, input, mean, rstd)
        )
        sites = {
            "weight": AffineSite(g, x, mean, rstd, ctx.shape),
            "bias": AffineSite(g, shape=ctx.shape),
        }
        return None, None, None, input_grad, *ctx.call.gradients(**sites)
