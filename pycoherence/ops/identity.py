"""The template: the smallest op that goes the whole way, to copy when adding one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import OpSpec
from pycoherence.ops.family.reduce import check_factors, randn


def identity(x: Tensor) -> Tensor:
    """A contiguous copy of a tensor.

    .. math:: y = x

    Args:
        x: Any shape and strides, float16/bfloat16/float32/float64.

    Returns:
        The copy, of the same shape, dtype and device.

    Raises:
        TypeError: The dtype is not floating.

    Cost: One read and one write of `x`.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.ops.identity(torch.arange(3.0))
        tensor([0., 1., 2.])
    """
    return torch.ops.pycoherence.identity(x)


def _check(x: Tensor) -> None:
    check_factors("identity", x=x)


def _reference(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    yield (randn(3, 5, device=device, dtype=dtype),)
    yield (randn(6, 5, device=device, dtype=dtype).mT[::2],)
    yield (randn(0, 4, device=device, dtype=dtype),)
    yield (randn(device=device, dtype=dtype),)


SPEC = register(
    OpSpec(
        schema="identity(Tensor x) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        samples=_samples,
    )
)
