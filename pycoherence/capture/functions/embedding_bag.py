"""`torch.nn.functional.embedding_bag`: lookups that are added up."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition


@register_decomposition(F.embedding_bag)
def embedding_bag(
    c: CallContext,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    ids, weights = input, per_sample_weights
    valid = torch.ones_like(input, dtype=torch.bool)
    if offsets is not None:
        ids, weights, valid = _bags(input, weights, offsets, last=include_last_offset)
        # Each bag is an example, whatever the list of all ids looked like.
        c.by_rows(ids)
        if weights is not None:
            c.by_rows(weights)
    if padding_idx is not None:
        valid = valid & (ids != padding_idx % len(weight))
    with c.tracked():
        rows = F.embedding(
            ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
        if weights is not None:
            rows = rows * weights.unsqueeze(-1)
        valid = valid.unsqueeze(-1)
        if mode == "max":
            largest = rows.masked_fill(~valid, -torch.inf)
            found = largest.amax(1) if rows.shape[1] == 0 else largest.max(1).values
            return found.masked_fill(~valid.any(1), 0)
        total = rows.masked_fill(~valid, 0).sum(1)
        return total / valid.sum(1).clamp(min=1) if mode == "mean" else total


def _bags(
    ids: Tensor, weights: Tensor | None, offsets: Tensor, *, last: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Bags `[B, n]`, padded to the size of the largest, their weights, and which ids count."""
    n = max(0, len(offsets) - 1) if last else len(offsets)
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
    starts, ends = offsets[:n], ends[:n]
    most = int((ends - starts).max()) if n else 0
    place = torch.arange(most, device=ids.device) + starts.unsqueeze(1)
    valid = place < ends.unsqueeze(1)
    place = place.clamp(max=max(0, len(ids) - 1))
    found = ids[place] if len(ids) else ids.new_zeros(place.shape)
    return found, None if weights is None else weights[place], valid
