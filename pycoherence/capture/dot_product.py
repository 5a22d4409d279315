"""`torch.nn.functional.scaled_dot_product_attention` of learned queries or a learned bias."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.capture.broadcast import spread


@register_site(F.scaled_dot_product_attention)
def attention(
    capture: Capture,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Give each example its own copy of what is the same for all, and then attend."""
    inputs = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    parameters = [x for x in inputs if capture.names_of(x)]
    examples = [x for x in inputs[:3] if not capture.is_alone(x)]
    if len(parameters) != 1 or not examples:
        return NotImplemented
    parameter, like = parameters[0], examples[0]
    size = [1] * (like.dim() - parameter.dim()) + list(parameter.shape)
    own = spread(capture, parameter, [len(like), *size[1:]])
    if own is NotImplemented:
        return NotImplemented
    own = {id(parameter): own}
    query, key, value = (own.get(id(x), x) for x in inputs[:3])
    if attn_mask is not None:
        attn_mask = own.get(id(attn_mask), attn_mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
