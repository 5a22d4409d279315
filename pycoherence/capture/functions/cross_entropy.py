"""`torch.nn.functional.linear_cross_entropy`: a head and its loss in one function."""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition

_FUSED: Any = getattr(F, "linear_cross_entropy", None)  # torch 2.13 has it


def linear_cross_entropy(
    c: CallContext, input: Tensor, linear_weight: Tensor, target: Tensor, *args: Any, **kwargs: Any
) -> Any:
    bound = inspect.signature(_FUSED).bind(input, linear_weight, target, *args, **kwargs)
    given = dict(bound.arguments)
    given.pop("options", None)  # how it is cut in chunks, which changes no number
    x, weight, target = (given.pop(name) for name in list(given)[:3])
    bias = given.pop("linear_bias", None)
    if given.get("ignore_index", 0) is None:
        del given["ignore_index"]
    if weight.dim() != 2:
        return NotImplemented
    with c.tracked():
        scores = F.linear(x, weight, bias)
        if scores.dim() > 2 and target.dim() == scores.dim() - 1:
            scores = scores.movedim(-1, 1)
        return F.cross_entropy(scores, target, **given)


if _FUSED is not None:
    register_decomposition(_FUSED)(linear_cross_entropy)
