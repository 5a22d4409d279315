"""`torch.einsum` of a parameter and examples, where that is a linear layer."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.capture.linear import linear


@register_site(torch.einsum)
def einsum(capture: Capture, equation: Any, *operands: Any) -> Any:
    """As a linear layer if each index is the batch, a position, or summed or made over."""
    tensors = operands[0] if len(operands) == 1 and not _is_tensor(operands[0]) else operands
    if not isinstance(equation, str) or len(tensors) != 2 or not all(map(_is_tensor, tensors)):
        return NotImplemented
    sides = equation.replace(" ", "").split("->")
    names = sides[0].split(",")
    first = bool(capture.names_of(tensors[0]))
    if len(sides) != 2 or "." in equation or capture.names_of(tensors[first]):
        return NotImplemented
    (x, p), (of_x, of_p) = (tensors[::-1], names[::-1]) if first else (tensors, names)
    out = sides[1]
    inner = [i for i in of_p if i in of_x]
    outer = [i for i in of_p if i not in of_x]
    ahead = [i for i in of_x if i not in of_p]
    once = all(len(set(name)) == len(name) for name in (of_x, of_p, out))
    if not once or not ahead or ahead[0] != of_x[0] or any(i in out for i in inner):
        return NotImplemented
    if sorted(out) != sorted(ahead + outer) or not inner:
        return NotImplemented
    size = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_p, p.shape, strict=True))
    features = prod(size[i] for i in inner)
    seen = x.permute(*[of_x.index(i) for i in ahead + inner])
    seen = seen.reshape(*(size[i] for i in ahead), features)

    def weight(p: Tensor) -> Tensor:
        ordered = p.permute(*[of_p.index(i) for i in outer + inner])
        return ordered.reshape(-1, features)

    found = linear(capture, seen, capture.make(weight, p))
    found = found.reshape(*(size[i] for i in ahead + outer))
    return found.permute(*[(ahead + outer).index(i) for i in out])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
