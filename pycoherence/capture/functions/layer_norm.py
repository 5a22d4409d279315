"""`torch.nn.functional.layer_norm`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.capture.sharded import Cuts
from pycoherence.sites import AffineSite, Site


class LayerNorm(LayerRule):
    """Normalised rows, scaled and shifted."""

    cuts = Cuts(((0, 1, 2, 3),) * 2)

    def __init__(self, shape: Sequence[int], eps: float) -> None:
        self._shape, self._eps = list(shape), eps
        self.features = len(self._shape)

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Kept]:
        output, mean, rstd = torch.native_layer_norm(x, self._shape, weight, bias, self._eps)
        return output, (x, mean, rstd, weight, bias)

    def input_grad(
        self, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, bias: Any
    ) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward.default(
            g, x, self._shape, mean, rstd, weight, bias, [True, False, False]
        )[0]

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, bias: Any
    ) -> tuple[Site, Site]:
        shape = None
        if self.features > 1:
            shape = self._shape
            g, x, mean, rstd = (t.flatten(-self.features) for t in (g, x, mean, rstd))
        g, x, mean, rstd = rows(g), rows(x), rows(mean), rows(rstd)
        return AffineSite(g, x, mean, rstd, shape), AffineSite(g, None, None, None, shape)


@register_function(F.layer_norm, torch.layer_norm)
def layer_norm(
    c: CallContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if len(normalized_shape) >= input.dim():
        c.refuse(
            f"its input {tuple(input.shape)} has no batch dimension before those it normalises",
            "give it an input [B, ...]",
        )
    return c.layer(LayerNorm(normalized_shape, eps), input, weight, bias)
