"""`torch.nn.functional.prelu`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.capture.broadcast import elementwise


@register_site(F.prelu)
@register_site(torch.prelu)
@register_site(Tensor.prelu)
def prelu(capture: Capture, input: Tensor, weight: Tensor) -> Any:
    if not capture.names_of(weight) or input.dim() < 2:
        return NotImplemented
    slope = capture.make(lambda x: x.view(-1, *[1] * (input.dim() - 2)), weight)
    return elementwise(_sloped)(capture, input, slope)


def _sloped(input: Tensor, slope: Tensor) -> Tensor:
    return torch.where(input > 0, input, slope * input)
