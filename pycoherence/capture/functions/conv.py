"""`torch.nn.functional.conv1d`, `conv2d` and `conv3d`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.ops.family.conv import per_dim, resolve_padding
from pycoherence.sites import AffineSite, ConvSite, Site, Window

Ints = int | Sequence[int]


class Conv(LayerRule):
    """A convolution; each image is a row.

    Args:
        window: The options of the convolution.
        output_padding: One number for each dimension; only a transposed convolution has it.
    """

    transposed: ClassVar[bool] = False

    def __init__(self, window: Window, output_padding: list[int] | None = None) -> None:
        n = len(window.stride)
        self.features = n + 1
        self.window, self.output_padding = window, output_padding or [0] * n
        *steps, groups = window[1:]
        self._options: tuple[Any, ...] = (*steps, self.transposed, self.output_padding, groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Kept]:
        return torch.convolution(x, weight, bias, *self._options), (x, weight)

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(g, x, weight, None, *self._options, mask)[0]

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Site | None, Site | None]:
        x, g = rows(x), rows(g)
        return self.site(x, g), AffineSite(channels_behind(g))

    def site(self, x: Tensor, g: Tensor) -> Site:
        """The site of the weight, from images `[B, T, C, *S]`."""
        images = x.shape[1]
        site = ConvSite(x.flatten(0, 1), g.flatten(0, 1), *self.window)
        return site if images == 1 else site.grouped(images)


def channels_behind(x: Tensor) -> Tensor:
    """`[B, T, C, *S]` to `[B, T S, C]`."""
    return x.flatten(3).movedim(2, -1).flatten(1, 2) if x.dim() > 3 else x


def _handler(n: int) -> Callable[..., Any]:
    def conv(
        c: CallContext,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: str | Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Any:
        if input.dim() != n + 2:
            return unbatched(c, input, n)
        strides, dilations = per_dim(stride, n, "stride"), per_dim(dilation, n, "dilation")
        with c.tracked() if isinstance(padding, str) else nullcontext():
            padded, pads = resolve_padding(input, weight.shape[2:], strides, padding, dilations)
        window = Window(weight.shape[2:], strides, pads, dilations, groups)
        return c.layer(Conv(window), padded, weight, bias)

    return conv


def unbatched(c: CallContext, input: Tensor, n: int) -> Any:
    c.refuse(
        f"its input {tuple(input.shape)} has no batch dimension",
        f"give it an input [B, C, ...] of {n + 2} dimensions",
    )


for _n, _function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
    register_function(_function)(_handler(_n))
