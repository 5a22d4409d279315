"""Lookups of a table, for tests of kernels on the emulated GPU."""

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def array(x: Tensor) -> np.ndarray:
    """For the module, which knows bfloat16 as the bits of uint16."""
    x = x.contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def sample(
    batch: int, positions: int, rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Ids, gradients of whole numbers (so that signs are sure), coefficients, a direction."""
    made = torch.Generator().manual_seed(batch + positions)
    ids = torch.randint(rows, (batch, positions), generator=made)
    g = torch.randint(-8, 9, (batch, positions, width), generator=made).to(dtype)
    coef = torch.randn(batch, generator=made, dtype=torch.float64)
    direction = torch.randn(rows, width, generator=made, dtype=torch.float64)
    return ids, g, coef, direction
