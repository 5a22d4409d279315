"""`torch.nn.functional.conv_transpose1d`, `conv_transpose2d` and `conv_transpose3d`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.functions.conv import channels_behind, unbatched
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.ops.family.conv import per_dim
from pycoherence.sites import AffineSite, ConvSite, Site

Ints = int | Sequence[int]


class ConvTranspose(LayerRule):
    """A transposed convolution; each image is a row."""

    def __init__(
        self,
        n: int,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        more: list[int],
        groups: int,
    ) -> None:
        self.features = n + 1
        self._window = (stride, padding, dilation)
        self._more, self._groups = more, groups

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Kept]:
        window = (*self._window, True, self._more, self._groups)
        return torch.convolution(x, weight, bias, *window), (x, weight)

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        window = (*self._window, True, self._more, self._groups)
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(g, x, weight, None, *window, mask)[0]

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Site | None, Site | None]:
        # It is the backward pass of a convolution whose output gradient is the input here; padding
        # of the output may give that more positions.
        stride = self._window[0]
        more = [added // step for added, step in zip(self._more, stride, strict=True)]
        seen = F.pad(x, [n for extra in reversed(more) for n in (0, extra)])
        seen, g = rows(seen), rows(g)
        images = g.shape[1]
        site = ConvSite(
            g.flatten(0, 1), seen.flatten(0, 1), weight.shape[2:], *self._window, self._groups
        )
        return site if images == 1 else site.grouped(images), AffineSite(channels_behind(g))


def _handler(n: int) -> Callable[..., Any]:
    def conv_transpose(
        c: CallContext,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        dilation: Ints = 1,
    ) -> Any:
        if input.dim() != n + 2:
            return unbatched(c, input, n)
        rule = ConvTranspose(
            n,
            per_dim(stride, n, "stride"),
            per_dim(padding, n, "padding"),
            per_dim(dilation, n, "dilation"),
            per_dim(output_padding, n, "output_padding"),
            groups,
        )
        return c.layer(rule, input, weight, bias)

    return conv_transpose


_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
for _n, _function in enumerate(_FUNCTIONS, 1):
    register_function(_function)(_handler(_n))
