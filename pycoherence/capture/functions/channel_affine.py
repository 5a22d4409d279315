"""Norms whose scale and shift come after what they normalise: batch and instance norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function, register_guard
from pycoherence.capture.functions.conv import channels_behind
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.model import MIXES, USE_OTHERS
from pycoherence.capture.rows import Rows
from pycoherence.sites import AffineSite, Site


class ChannelAffine(LayerRule):
    """`y = x * weight + bias` for `x` `[B, C, ...]`, one weight and bias for each channel."""

    def __init__(self, dims: int) -> None:
        self.features = dims - 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Kept]:
        scaled = x.clone() if weight is None else x * _per_channel(weight, x)
        output = scaled if bias is None else scaled + _per_channel(bias, x)
        return output.to(x.dtype), (x, weight)

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        return g if weight is None else (g * _per_channel(weight, x)).to(x.dtype)

    def factors(self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Site, Site]:
        g, x = channels_behind(rows(g)), channels_behind(rows(x))
        return AffineSite(g, x), AffineSite(g)


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(-1, *[1] * (x.dim() - 2))


def _affine(c: CallContext, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
    for parameter in (weight, bias):
        if parameter is not None and parameter.shape != x.shape[1:2]:
            c.refuse(
                f"its parameter of shape {tuple(parameter.shape)} does not fit the input "
                f"{tuple(x.shape)}",
                "give it one number for each channel",
            )
    return c.layer(ChannelAffine(x.dim()), x, weight, bias)


@register_function(F.batch_norm)
def batch_norm(
    c: CallContext,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    with c.tracked():
        normal = F.batch_norm(input, running_mean, running_var, eps=eps)
    return _affine(c, normal, weight, bias)


@register_function(F.instance_norm)
def instance_norm(
    c: CallContext,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    with c.tracked():
        normal = F.instance_norm(
            input, running_mean, running_var, None, None, use_input_stats, momentum, eps
        )
    return _affine(c, normal, weight, bias)


@register_guard(F.batch_norm)
def refuse_batch_statistics(
    c: CallContext,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training and c.is_example(input):
        c.refuse(MIXES, USE_OTHERS)


@register_guard(torch.batch_norm, torch.native_batch_norm)
def refuse_batch_statistics_of_torch(
    c: CallContext,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *options: object,
) -> None:
    refuse_batch_statistics(c, input, running_mean, running_var, weight, bias, training)
