"""`torch.nn.functional.embedding`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._layouts import either_way
from pycoherence.capture._registry import register_site
from pycoherence.sites import EmbeddingSite


@register_site(F.embedding)
@either_way
def embedding(
    capture: Capture,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    for option, value in (
        ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", scale_grad_by_freq),
        ("sparse", sparse),
    ):
        if value:
            capture.refuse(
                f"the option {option} has no per-example meaning here",
                f"build the layer without {option}",
            )
    shared = input.dim() < 2 or (input.shape[0] == 1 and capture.batch.count != 1)
    if shared and capture.is_alone(input):
        return NotImplemented  # positions: what all examples look up is made of the table alone
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    call = capture.call(input, weight=weight)
    return _Embedding.apply(call, input, weight, padding_idx, *call.probes)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, ids: Tensor, weight: Tensor, padding_idx: int | None, *probes: Tensor
    ) -> Tensor:
        ctx.padding_idx, ctx.num_embeddings = padding_idx, weight.shape[0]
        call.save(ctx, ids)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = saved(ctx)
        site = EmbeddingSite(ids, g, ctx.num_embeddings, ctx.padding_idx)
        weight_grad, *probe_grads = ctx.call.gradients(weight=site)
        return None, None, weight_grad, None, *probe_grads
