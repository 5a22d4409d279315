"""`torch.nn.functional.bilinear`."""

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.capture.linear import linear


@register_site(F.bilinear)
def bilinear(
    capture: Capture, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    return linear(capture, pairs, capture.make(lambda x: x.flatten(1), weight), bias)
