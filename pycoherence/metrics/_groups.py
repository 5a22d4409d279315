"""Examples by group: labels as one mask per group, and sums over each group."""

from typing import Any

import torch
from torch import Tensor

from pycoherence.metrics._arguments import to_count

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_indices(caller: str, name: str, value: Any, device: torch.device) -> None:
    """Raise unless `value` is an integer tensor on `device`."""
    dtype = getattr(value, "dtype", type(value).__name__)
    if dtype not in _INTEGERS:
        raise TypeError(
            f"{caller}: expected {name} to be an integer tensor, got {dtype}; "
            "pass one index per example, converted with .long()"
        )
    if value.device != device:
        raise TypeError(
            f"{caller}: expected {name} on {device}, got {value.device}; move it with .to(device)"
        )


def to_members(caller: str, name: str, labels: Tensor, count: int | None, like: Tensor) -> Tensor:
    """One mask per group, `[K, B]`, for labels of the last dimension of `like`."""
    if isinstance(labels, Tensor) and labels.dtype == torch.bool:
        labels, count = labels.long(), 2 if count is None else count
    check_indices(caller, name, labels, like.device)
    labels = labels.long()  # a comparison in a narrow type wraps around
    if labels.shape != like.shape[-1:]:
        raise ValueError(
            f"{caller}: expected {name} [{like.shape[-1]}], got shape {list(labels.shape)}; "
            "pass one index per example"
        )
    if count is None:
        count = max(int(labels.max()) + 1, 0) if len(labels) else 0
    groups = to_count(caller, f"num_{name}", count, 0, "how many there are")
    if not ((labels >= 0) & (labels < groups)).all():
        raise ValueError(
            f"{caller}: expected {name} in [0, {groups}), got values from {labels.min().item()} "
            f"to {labels.max().item()}; number them from 0"
        )
    return torch.arange(groups, device=labels.device).unsqueeze(-1) == labels


def sum_by_group(values: Tensor, members: Tensor) -> Tensor:
    """The sums of `values` `[..., B]` over each group, `[..., K]`."""
    # A product with the masks would carry one example's NaN into every group.
    sums = [torch.where(mask, values, 0.0).sum(dim=-1) for mask in members]
    return torch.stack(sums, dim=-1) if sums else values.new_zeros(*values.shape[:-1], 0)
