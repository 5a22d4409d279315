"""`torch.nn.functional.conv_transpose1d`, `conv_transpose2d` and `conv_transpose3d`."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.functions.conv import Conv, channels_behind, unbatched
from pycoherence.capture.rows import Rows
from pycoherence.ops.family.conv import per_dim
from pycoherence.sites import AffineSite, Site, Window

Ints = int | Sequence[int]


class ConvTranspose(Conv):
    """A transposed convolution; each image is a row."""

    transposed: ClassVar[bool] = True

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Site | None, Site | None]:
        # It is the backward pass of a convolution whose output gradient is the input here; padding
        # of the output may give that more positions.
        steps = zip(self.output_padding, self.window.stride, strict=True)
        more = [added // step for added, step in steps]
        seen = F.pad(x, [n for extra in reversed(more) for n in (0, extra)])
        seen, g = rows(seen), rows(g)
        return self.site(g, seen), AffineSite(channels_behind(g))


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
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        numbers = {name: per_dim(value, n, name) for name, value in options.items()}
        window = Window(weight.shape[2:], groups=groups, **numbers)
        rule = ConvTranspose(window, per_dim(output_padding, n, "output_padding"))
        return c.layer(rule, input, weight, bias)

    return conv_transpose


_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
for _n, _function in enumerate(_FUNCTIONS, 1):
    register_function(_function)(_handler(_n))
