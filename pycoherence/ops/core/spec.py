"""The description of an op: its schema, its slow truth, and what its fast paths accept."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Outputs = Tensor | tuple[Tensor | None, ...]
"""The result of an op; `None` stands for an output that was not asked for."""


@dataclass(frozen=True)
class OpSpec:
    """One operation on tensors.

    Attributes:
        schema: The torch schema, `name(arguments) -> returns`, without a namespace.
        check: Raises `ValueError` or `TypeError` for arguments that no backend may see.
        reference: Plain torch on any device; the truth of the tests.
        fake: Outputs of the right shape, dtype and device without data, for `torch.compile`.
        samples: `(device, dtype)` to argument tuples; for the tests, `selftest`, benchmarks.
        supports: Backend name to a function of the arguments that returns why the backend
            cannot run them, or `None`. A backend that is not named accepts all that `check` does.
        dtypes: Dtypes that `samples` can be asked for.
        helper: Goes to a Triton kernel as its argument `helper`, for the part of its work that is
            another op's: kernels call no ops.
    """

    schema: str
    check: Callable[..., None]
    reference: Callable[..., Outputs]
    fake: Callable[..., Outputs]
    samples: Callable[[torch.device | str, torch.dtype], Iterable[tuple[Any, ...]]]
    supports: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    helper: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name of the op."""
        return self.schema.partition("(")[0]


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments of an op, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_of(arg)


def device_type(args: tuple[Any, ...]) -> str:
    """The kind of device of the first tensor, which is an op's first argument or in it."""
    first = args[0]
    return (first if isinstance(first, Tensor) else first[0]).device.type


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a statistic of `dtype` inputs is summed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32
