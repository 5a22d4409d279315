"""`torch.nn.functional.rms_norm`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.capture.sharded import Cuts
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.sites import AffineSite, Site


class RMSNorm(LayerRule):
    """Rows divided by the root of their mean square, and scaled."""

    cuts = Cuts(((0, 1),))

    def __init__(self, shape: Sequence[int], eps: float | None) -> None:
        self._shape, self._eps = list(shape), eps
        self.features = len(self._shape)

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Kept]:
        return F.rms_norm(x, self._shape, weight, self._eps), (x, weight)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.flatten(-self.features).to(accumulate_dtype(x.dtype))
        eps = torch.finfo(wide.dtype).eps if self._eps is None else self._eps
        return wide, (wide.square().mean(-1, keepdim=True) + eps).rsqrt()

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        wide, rstd = self._normalised(x)
        scaled = g.flatten(-self.features) * weight.flatten().to(wide.dtype)
        normal = wide * rstd
        along = (scaled * normal).mean(-1, keepdim=True)
        return ((scaled - normal * along) * rstd).to(x.dtype).reshape(x.shape)

    def factors(self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor) -> tuple[Site]:
        _, rstd = self._normalised(x)
        g, x, rstd = (rows(t) for t in (*(t.flatten(-self.features) for t in (g, x)), rstd))
        return (AffineSite(g, x, rstd=rstd, shape=self._shape),)


@register_function(F.rms_norm, torch.rms_norm)
def rms_norm(
    c: CallContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if len(normalized_shape) >= input.dim():
        c.refuse(
            f"its input {tuple(input.shape)} has no batch dimension before those it normalises",
            "give it an input [B, ...]",
        )
    return c.layer(RMSNorm(normalized_shape, eps), input, weight)
