"""`torch.nn.functional.linear`."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_function
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.propagation import dims_of_owner
from pycoherence.capture.rows import Rows
from pycoherence.capture.sharded import Cuts
from pycoherence.capture.torch_internals import untracked_views
from pycoherence.sites import AffineSite, LinearSite, Site


class Linear(LayerRule):
    """`y = x W^T + b`, for rows of `I` features."""

    cuts = Cuts(((0, 1), (0,)), {(0, 0): {0: -1}, (0, 1): {1: -1}, (1, 0): {0: -1}})

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Kept]:
        with untracked_views():
            return F.linear(x, weight, bias), (x, weight)

    def needed(self, kept: Kept, wants: Sequence[bool], inputs: bool) -> Kept:
        x, weight = kept
        return x if wants[0] else None, weight if inputs else None

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return g @ weight

    def factors(
        self, rows: Rows, g: Tensor, x: Tensor | None, weight: Tensor | None
    ) -> tuple[Site | None, Site | None]:
        g = rows(g)
        return None if x is None else LinearSite(rows(x), g), AffineSite(g)


_LINEAR = Linear()


@register_function(F.linear)
def linear(c: CallContext, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return _broadcast(c, input, weight, bias)
    if input.dim() < 2:
        if input.shape != weight.shape[1:] or not c.is_example(input):
            return NotImplemented
        if len(dims_of_owner(c.facts(input).owner, tuple(input.shape))):
            c.refuse(
                f"its input {tuple(input.shape)} has no batch dimension",
                "give it an input [B, ...] of two or more dimensions",
            )
        with c.tracked():
            return F.linear(input.unsqueeze(0), weight, bias).squeeze(0)
    return c.layer(_LINEAR, input, weight, bias)


def _broadcast(c: CallContext, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """A weight that is a vector, or a bias that is broadcast: as a product and a sum."""
    with c.tracked():
        product = input @ (weight.mT if weight.dim() == 2 else weight)
        return product if bias is None else product + bias
