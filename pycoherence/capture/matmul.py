"""Products of matrices: `x @ weight`, `weight @ x`, `addmm`, `baddbmm`."""

from typing import Any

import torch
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_site
from pycoherence.capture.linear import linear


@register_site(torch.matmul)
@register_site(torch.mm)
@register_site(Tensor.matmul)
@register_site(Tensor.mm)
@register_site(Tensor.__matmul__)
def matmul(capture: Capture, input: Tensor, other: Tensor) -> Any:
    if capture.names_of(other):
        if other.dim() != 2 or input.dim() < 2 or capture.names_of(input):
            return NotImplemented
        return linear(capture, input, capture.make(_transposed, other))
    if input.dim() != 2 or other.dim() < 3:
        return NotImplemented
    return linear(capture, other.mT, input).mT


@register_site(Tensor.__rmatmul__)
def rmatmul(capture: Capture, input: Tensor, other: Tensor) -> Any:
    return matmul(capture, other, input)


@register_site(torch.addmm)
@register_site(Tensor.addmm)
def addmm(
    capture: Capture,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Any:
    plain = beta == 1 and alpha == 1 and out is None
    if not plain or input.dim() != 1 or not capture.names_of(mat2) or capture.names_of(mat1):
        return NotImplemented
    return linear(capture, mat1, capture.make(_transposed, mat2), input)


@register_site(torch.baddbmm)
@register_site(Tensor.baddbmm)
def baddbmm(
    capture: Capture,
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Any:
    if out is not None or capture.names_of(batch1) or capture.names_of(batch2):
        return NotImplemented
    return capture.run(torch.add, alpha * torch.bmm(batch1, batch2), input, alpha=beta)


def _transposed(x: Tensor) -> Tensor:
    return x.mT
