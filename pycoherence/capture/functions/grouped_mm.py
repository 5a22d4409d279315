"""`torch.nn.functional.grouped_mm`: rows in groups, each multiplied with a matrix of its own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition

_FUNCTIONS = [getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)]


def grouped_mm(
    c: CallContext,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Multiply group by group, so that each slice of the matrices is a parameter of its rows."""
    if bias is not None or out_dtype not in (None, mat_a.dtype):
        return NotImplemented
    with c.tracked():
        if offs is None or mat_a.dim() == mat_b.dim() == 3:
            return torch.bmm(mat_a, mat_b)
        if mat_a.dim() != 2 or mat_b.dim() != 3:
            return NotImplemented
        ends = offs.tolist()
        starts = [0, *ends[:-1]]
        parts = [mat_a[s:e] @ w for s, e, w in zip(starts, ends, mat_b.unbind(0), strict=True)]
        if ends[-1] < len(mat_a):
            parts.append(mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[-1]))
        return torch.cat(parts)


for _function in _FUNCTIONS:
    if _function is not None:
        register_decomposition(_function)(grouped_mm)
