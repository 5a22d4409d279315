"""`torch.nn.functional.embedding`."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._layouts import either_way
from pycoherence.capture._registry import register_site, register_spreader
from pycoherence.sites import EmbeddingSite


@register_site(F.embedding)
@register_spreader(F.embedding)
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
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]

    own = partial(_own, capture, input, weight, padding_idx)
    if not capture.is_alone(input) or _is_expanded(input, capture.batch.count):
        return own()
    # Positions, or pairs of them: which dimension is the batch, if any, shows where they are used.
    return capture.share(
        lambda table: F.embedding(input, table, padding_idx),
        weight,
        own if input.dim() > 1 else None,
    )


@either_way
def _own(capture: Capture, input: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    call = capture.call(input, weight=weight)
    return _Embedding.apply(call, input, weight, padding_idx, *call.probes)


def _is_expanded(ids: Tensor, rows: int | None) -> bool:
    """Whether ids that all examples share were expanded to a row for each."""
    if ids.dim() < 2:
        return False
    if len(ids) == 1:
        return rows == 1
    return ids.stride(0) == 0 and len(ids) == (rows or len(ids))


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
