"""The middle one of three numbers, element by element."""

# torch's stubs do not export the operations on lists.
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor


def median3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The median itself, not `a + b + c - min - max`, in which a large number drowns it."""
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def foreach_median3(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> tuple[Tensor, ...]:
    """`median3` of each element of the lists."""
    low, high = torch._foreach_minimum(a, b), torch._foreach_maximum(a, b)
    torch._foreach_minimum_(high, c)
    torch._foreach_maximum_(low, high)
    return low
