"""`torch.nn.functional.group_norm`."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.functions.conv import channels_behind
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.sites import AffineSite, Site


class GroupNorm(LayerRule):
    """Channels normalised by groups, scaled and shifted; each image is a row."""

    def __init__(self, dims: int, groups: int, eps: float) -> None:
        self.features = dims - 1
        self._groups, self._eps = groups, eps

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Kept]:
        x = x.contiguous(memory_format=_layout(x))
        # The kernels read scale and shift as they lie in memory.
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        self._sizes = (x.shape[0], x.shape[1], prod(x.shape[2:]), self._groups)
        output, mean, rstd = torch.native_group_norm(x, weight, bias, *self._sizes, self._eps)
        return output, (x, mean, rstd, weight)

    def input_grad(self, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any) -> Tensor:
        return torch.ops.aten.native_group_norm_backward(
            g.contiguous(memory_format=_layout(x)),
            x,
            mean,
            rstd,
            weight,
            *self._sizes,
            [True, False, False],
        )[0]

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any
    ) -> tuple[Site, Site]:
        channels = self._sizes[1]
        size = [channels // self._groups, *[1] * (x.dim() - 2)]
        mean, rstd = (
            s.repeat_interleave(size[0], 1).view(len(s), channels, *size[1:]).expand(x.shape)
            if rows(x).shape[1] > 1
            else s.repeat_interleave(size[0], 1).view(len(s), channels, *size[1:])
            for s in (mean, rstd)
        )
        g, x, mean, rstd = (channels_behind(rows(t)) for t in (g, x, mean, rstd))
        return AffineSite(g, x, mean, rstd), AffineSite(g)


@register_function(F.group_norm)
def group_norm(
    c: CallContext,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return c.layer(GroupNorm(input.dim(), num_groups, eps), input, weight, bias)


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which torch's own group_norm computes, and returns its output."""
    if x.device.type == "cpu" and x.dim() in (4, 5):
        channels_last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format
