"""Probes: zero-valued inputs of a captured call whose gradients are the statistics.

Autograd itself then carries the statistics out of the backward pass and adds up what several uses
contribute, without side effects.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pycoherence.ops._spec import accumulate_dtype

Shape = Callable[[int, Tensor], tuple[int, ...]]
"""Shape of a probe, from the batch size and the parameter."""


def per_example(batch: int, parameter: Tensor) -> tuple[int, ...]:
    """One number for each example."""
    return (batch,)


def scalar(batch: int, parameter: Tensor) -> tuple[int, ...]:
    """One number."""
    return ()


def like_parameter(batch: int, parameter: Tensor) -> tuple[int, ...]:
    """One number for each of the parameter's."""
    return tuple(parameter.shape)


def make_probes(outputs: Mapping[str, Shape], batch: int, parameter: Tensor) -> dict[str, Tensor]:
    """A probe for each output of one parameter; its zeros take no memory, whatever its shape."""
    dtype = accumulate_dtype(parameter.dtype)
    return {
        name: torch.zeros((), dtype=dtype, device=parameter.device)
        .expand(shape(batch, parameter))
        .requires_grad_()
        for name, shape in outputs.items()
    }
