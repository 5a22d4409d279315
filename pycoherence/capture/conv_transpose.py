"""`torch.nn.functional.conv_transpose1d`, `conv_transpose2d` and `conv_transpose3d`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.ops._conv import per_dim
from pycoherence.sites import AffineSite, ConvSite
from pycoherence.sites._site import channels_last

Ints = int | Sequence[int]
Options = tuple[list[int], list[int], list[int], list[int], int]


def _handler(n: int) -> Callable[..., Tensor]:
    def conv_transpose(
        capture: Capture,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        dilation: Ints = 1,
    ) -> Tensor:
        if input.dim() != n + 2:
            capture.refuse(
                f"its input {tuple(input.shape)} has no batch dimension",
                f"give it an input [B, C, ...] of {n + 2} dimensions",
            )
        call = capture.call(input, weight=weight, bias=bias)
        options = (
            per_dim(stride, n, "stride"),
            per_dim(padding, n, "padding"),
            per_dim(dilation, n, "dilation"),
            per_dim(output_padding, n, "output_padding"),
            groups,
        )
        return _ConvTranspose.apply(call, options, input, weight, bias, *call.probes)

    return conv_transpose


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        options: Options,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *probes: Tensor,
    ) -> Tensor:
        ctx.options = options
        call.save(ctx, input, weight)
        stride, padding, dilation, output_padding, groups = options
        return torch.convolution(
            input, weight, bias, stride, padding, dilation, True, output_padding, groups
        )

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = saved(ctx)
        stride, padding, dilation, output_padding, groups = ctx.options
        input_grad = None
        if ctx.needs_input_grad[2]:
            input_grad = torch.ops.aten.convolution_backward(
                *(g, input, weight, None, stride, padding, dilation, True),
                *(output_padding, groups, [True, False, False]),
            )[0]
        # It is the backward pass of a convolution whose output gradient is the input here; padding
        # of the output may give that more positions.
        more = [added // step for added, step in zip(output_padding, stride, strict=True)]
        seen = F.pad(input, [n for extra in reversed(more) for n in (0, extra)])
        window = (weight.shape[2:], stride, padding, dilation)
        sites = {
            "weight": ConvSite(g, seen, *window, groups),
            "bias": AffineSite(channels_last(g)),
        }
        return None, None, input_grad, *ctx.call.gradients(**sites)


_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
for _n, _function in enumerate(_FUNCTIONS, 1):
    register_site(_function)(_handler(_n))
