"""Functions that take numbers one by one, but not as broadcasting has it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition


@register_decomposition(F.prelu, torch.prelu, Tensor.prelu)
def prelu(c: CallContext, input: Tensor, weight: Tensor) -> Any:
    with c.tracked():
        slope = weight.view(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else weight
        return torch.where(input > 0, input, slope * input)


@register_decomposition(torch.masked_fill, Tensor.masked_fill)
def masked_fill(c: CallContext, input: Tensor, mask: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return NotImplemented
    with c.tracked():
        return torch.where(mask, value, input)


@register_decomposition(Tensor.masked_fill_)
def masked_fill_in_place(c: CallContext, input: Tensor, mask: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return NotImplemented
    with c.tracked():
        return input.copy_(torch.where(mask, value, input))


@register_decomposition(torch.fill)
def fill(c: CallContext, input: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return NotImplemented
    with c.tracked():
        return torch.empty_like(input).copy_(value)


@register_decomposition(Tensor.fill_)
def fill_in_place(c: CallContext, input: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return NotImplemented
    with c.tracked():
        return input.copy_(value)


@register_decomposition(F.bilinear)
def bilinear(
    c: CallContext, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    with c.tracked():
        pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(pairs, weight.flatten(1), bias)
