"""`torch.nn.functional.rms_norm`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._layouts import either_way
from pycoherence.capture._registry import register_site
from pycoherence.ops._spec import accumulate_dtype
from pycoherence.sites import AffineSite
from pycoherence.sites._site import positions_last


@register_site(F.rms_norm)
@either_way
def rms_norm(
    capture: Capture,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if len(normalized_shape) >= input.dim():
        capture.refuse(
            f"its input {tuple(input.shape)} has no batch dimension before those it normalises",
            "give it an input [B, ...]",
        )
    call = capture.call(input, weight=weight)
    return _RMSNorm.apply(call, list(normalized_shape), eps, input, weight, *call.probes)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        shape: list[int],
        eps: float | None,
        input: Tensor,
        weight: Tensor,
        *probes: Tensor,
    ) -> Tensor:
        ctx.shape = shape
        wide = accumulate_dtype(input.dtype)
        ctx.eps = torch.finfo(wide).eps if eps is None else eps
        call.save(ctx, input, weight)
        return F.rms_norm(input, shape, weight, eps)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = saved(ctx)
        g, x = (positions_last(s.flatten(-len(ctx.shape))) for s in (g, input))
        wide = x.to(accumulate_dtype(x.dtype))
        rstd = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        input_grad = None
        if ctx.needs_input_grad[3]:
            scaled, normal = g * weight.flatten().to(wide.dtype), wide * rstd
            along = (scaled * normal).mean(-1, keepdim=True)
            input_grad = ((scaled - normal * along) * rstd).to(x.dtype).reshape(input.shape)
        site = AffineSite(g, x, rstd=rstd, shape=ctx.shape)
        return None, None, None, input_grad, *ctx.call.gradients(weight=site)
