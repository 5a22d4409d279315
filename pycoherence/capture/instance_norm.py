"""`torch.nn.functional.instance_norm`."""

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._affine import Affine, check_channels
from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site


@register_site(F.instance_norm)
def instance_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    check_channels(capture, input, weight, bias)
    call = capture.call(input, weight=weight, bias=bias)
    normal = F.instance_norm(
        input, running_mean, running_var, None, None, use_input_stats, momentum, eps
    )
    return Affine.apply(call, normal, weight, bias, *call.probes)
