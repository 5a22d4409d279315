"""`torch.nn.functional.batch_norm`: refused in training, an affine map in evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._affine import Affine
from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_guard, register_site


@register_guard(F.batch_norm)
def refuse_batch_statistics(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training:
        capture.refuse(
            "batch statistics mix the examples, so that none has a gradient of its own",
            "put the model, or its BatchNorm layers, in eval mode while measuring, or use "
            "GroupNorm or LayerNorm",
        )


@register_guard(torch.batch_norm)
@register_guard(torch.native_batch_norm)
def refuse_batch_statistics_of_torch(
    capture: Capture,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *options: object,
) -> None:
    refuse_batch_statistics(capture, input, running_mean, running_var, weight, bias, training)


@register_site(F.batch_norm)
def batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    call = capture.call(input, weight=weight, bias=bias)
    normal = F.batch_norm(input, running_mean, running_var, eps=eps)
    return Affine.apply(call, normal, weight, bias, *call.probes)
