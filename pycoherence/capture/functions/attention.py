"""`torch.nn.functional.multi_head_attention_forward`."""

import inspect
from math import sqrt
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@register_decomposition(F.multi_head_attention_forward)
def attention(c: CallContext, *args: Any, **kwargs: Any) -> Any:
    """Carry attention out with the batch first, where torch has it second."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = SimpleNamespace(**bound.arguments)
    if a.query.dim() == 2:
        c.refuse(
            f"its query {tuple(a.query.shape)} has no batch dimension",
            "give it a query, key and value of three dimensions",
        )
    if not _fits(a):
        return NotImplemented  # torch says why
    for x in (a.query, a.key, a.value):
        c.declare(x, 1)
    for mask in (a.attn_mask, a.key_padding_mask):
        if mask is not None:
            declare_mask(c, a, mask)
    with c.tracked():
        return _attend(c, a)


def declare_mask(c: CallContext, a: SimpleNamespace, mask: Tensor) -> None:
    """A mask of a batch has it first; one `[T, S]` is the same for all examples."""
    if mask is a.attn_mask and mask.dim() == 2:
        c.share_soft(mask)


def _attend(c: CallContext, a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    q, k, v = _projected(c, a)
    if a.bias_k is not None:
        own = (len(k), 1, k.shape[-1])
        k = torch.cat([k, a.bias_k.expand(own)], 1)
        v = torch.cat([v, a.bias_v.expand(own)], 1)
    heads = (a.num_heads, q.shape[-1] // a.num_heads)
    q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))
    if a.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    mask = _mask(c, a, q, k.shape[2])
    dropout = a.dropout_p if a.training else 0.0
    weights = None
    if a.need_weights:
        weights = _scores(q, k, mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        found = weights @ v
        weights = weights.mean(1) if a.average_attn_weights else weights
    else:
        causal = a.is_causal and mask is None
        found = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    found = found.transpose(1, 2).flatten(2)
    found = F.linear(found, a.out_proj_weight, a.out_proj_bias)
    # Torch lays it out like this, and dropout behind it has to draw the same numbers.
    found = found.transpose(0, 1).contiguous()
    return found, weights


def _fits(a: SimpleNamespace) -> bool:
    """Whether the arguments fit each other, and are those that layers pass."""
    if a.query.dim() != 3 or a.key.dim() != 3 or a.value.dim() != 3:
        return False
    (length, size, width), (source, *_) = a.query.shape, a.key.shape
    masks = [(length, source), (size * a.num_heads, length, source)]
    same = a.key.shape[:2] == a.value.shape[:2] and a.key.shape[1] == size
    return (
        same
        and width == a.embed_dim_to_check
        and width % a.num_heads == 0
        and (a.bias_k is None) == (a.bias_v is None)
        and a.static_k is None
        and a.static_v is None
        and (a.attn_mask is not None or not a.is_causal)
        and (a.attn_mask is None or tuple(a.attn_mask.shape) in masks)
        and (a.key_padding_mask is None or tuple(a.key_padding_mask.shape) == (size, source))
    )


def _projected(c: CallContext, a: SimpleNamespace) -> list[Tensor]:
    """Query, key and value, `[B, T, E]`, after their projections."""
    found = {id(x): x.transpose(0, 1) for x in (a.query, a.key, a.value)}
    inputs = [found[id(x)] for x in (a.query, a.key, a.value)]
    if not a.use_separate_proj_weight and len(found) == 1:
        out = F.linear(inputs[0], a.in_proj_weight, a.in_proj_bias)
        return list(out.chunk(3, -1))
    weights = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    if not a.use_separate_proj_weight:
        weights = a.in_proj_weight.chunk(3)
    biases = [None] * 3
    if a.in_proj_bias is not None:
        biases = a.in_proj_bias.chunk(3)
    each = zip(inputs, weights, biases, strict=True)
    return [F.linear(x, weight, bias) for x, weight, bias in each]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * sqrt(1 / q.shape[-1])) @ k.mT
    return scores if mask is None else scores + mask


def _mask(c: CallContext, a: SimpleNamespace, q: Tensor, source: int) -> Tensor | None:
    """The mask that is added to the scores `[B, heads, T, source]`."""
    total = None
    if a.is_causal and a.key_padding_mask is None and not a.need_weights:
        return None
    if a.attn_mask is not None:
        own = a.attn_mask
        if own.dim() > 2 and c.names_of(own):
            c.refuse(
                f"its learned mask {tuple(own.shape)} has the examples and the heads in one "
                "dimension",
                "give it a mask [T, S] for all, or use F.scaled_dot_product_attention",
            )
        own = own.view(1, 1, *own.shape) if own.dim() == 2 else own.unflatten(0, q.shape[:2])
        total = _added(own, q, source)
    if a.key_padding_mask is not None:
        padding = _added(a.key_padding_mask, q, source)[:, None, None]
        total = padding if total is None else total + padding
    return total


def _added(mask: Tensor, q: Tensor, source: int) -> Tensor:
    """A mask in numbers, with all of what was put behind the keys let through."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
    return F.pad(mask, (0, source - mask.shape[-1]))
