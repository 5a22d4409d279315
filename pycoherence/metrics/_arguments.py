"""Checks that every metric makes of its arguments: floats or tensors in, the same kind out."""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

EXAMPLES = "the number of examples behind the sums"
"""The meaning of `n` to most of them."""


def to_tensor(caller: str, name: str, value: float | Tensor) -> Tensor:
    """`value` as a tensor of float32 or better; a Python number becomes float64."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(
                f"{caller}: expected {name} to be a floating-point tensor, got {value.dtype}; "
                "convert it with .double()"
            )
        return value.float() if value.element_size() < 4 else value
    if not isinstance(value, Real):
        raise TypeError(
            f"{caller}: expected {name} to be a number or a tensor, got {type(value).__name__}; "
            "pass a float or a torch.Tensor"
        )
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def to_tensors(caller: str, **values: float | Tensor) -> list[Tensor]:
    """The values as tensors after checking that they share one shape and device."""
    tensors = [to_tensor(caller, name, value) for name, value in values.items()]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = {name: list(tensor.shape) for name, tensor in zip(values, tensors, strict=True)}
        raise ValueError(
            f"{caller}: expected arguments of one shape, got {shapes}; "
            "pass one value per layer (or step) in every argument"
        )
    check_devices(caller, *values.values())
    return tensors


def check_devices(caller: str, *values: float | Tensor) -> None:
    """Raise unless all tensors among `values` are on one device."""
    devices = {str(value.device) for value in values if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise TypeError(
            f"{caller}: expected arguments on one device, got {sorted(devices)}; "
            "move them with .to(device)"
        )


def stack(
    caller: str, name: str, values: float | Tensor | Sequence[float] | Sequence[Tensor]
) -> Tensor:
    """A sequence of numbers or tensors as one tensor, stacked along its first dimension."""
    if not isinstance(values, Sequence):
        return to_tensor(caller, name, values)
    tensors = [to_tensor(caller, name, value) for value in values]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(
            f"{caller}: expected {name} of one shape, got {[list(t.shape) for t in tensors]}; "
            "pass tensors that can be stacked"
        )
    return torch.stack(tensors) if tensors else torch.empty(0, dtype=torch.float64, device="cpu")


def has_tensor(values: float | Tensor | Sequence[float] | Sequence[Tensor]) -> bool:
    """Whether `values` is a tensor or a sequence that holds one."""
    if isinstance(values, Sequence):
        return any(isinstance(value, Tensor) for value in values)
    return isinstance(values, Tensor)


def like(result: Tensor, *sources: Number) -> Number:
    """`result` as a float when no source is a tensor, as it is otherwise."""
    if any(isinstance(source, Tensor) for source in sources):
        return cast(Number, result)
    return cast(Number, result.item())


def to_count(caller: str, name: str, value: Any, minimum: int, meaning: str) -> int:
    """`value` as an int that is at least `minimum`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{caller}: expected {name} to be an integer, got {type(value).__name__}; "
            f"pass {meaning}"
        ) from None
    if count < minimum:
        raise ValueError(f"{caller}: expected {name} >= {minimum}, got {count}; pass {meaning}")
    return count


def to_scale(caller: str, name: str, value: float) -> float:
    """`value` as a float that is not negative and not NaN."""
    if not value >= 0:
        raise ValueError(f"{caller}: expected {name} >= 0, got {value}; pass a non-negative number")
    return float(value)
