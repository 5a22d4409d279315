"""`torch.nn.functional.linear`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._layouts import either_way
from pycoherence.capture._registry import register_site
from pycoherence.sites import AffineSite, LinearSite
from pycoherence.sites._site import positions_last


@register_site(F.linear)
@either_way
def linear(capture: Capture, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        capture.refuse(
            f"its weight and bias of shapes {shapes} are broadcast",
            "give it a weight [O, I] and a bias [O]",
        )
    call = capture.call(input, weight=weight, bias=bias)
    return _Linear.apply(call, input, weight, bias, *call.probes)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, *probes: Tensor
    ) -> Tensor:
        call.save(
            ctx,
            input if call.needs("weight") else None,
            weight if ctx.needs_input_grad[1] else None,
        )
        output = F.linear(input, weight, bias)
        # Autograd refuses changes in place to a view that a custom Function returns.
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = saved(ctx)
        input_grad = g @ weight if ctx.needs_input_grad[1] else None
        sites = {"weight": LinearSite(input, g), "bias": AffineSite(positions_last(g))}
        return None, input_grad, *ctx.call.gradients(**sites)
