"""The GPU under a tensor: what it is, how it multiplies, and how a kernel is launched on it."""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pycoherence.triton_kernels.launch.tape import launched


class Device(NamedTuple):
    """The facts on which the choice of a kernel's tiles depends.

    Attributes:
        capability: Compute capability, 90 for sm_90.
        processors: Number of streaming multiprocessors.
        name: Its name in torch.
    """

    capability: int
    processors: int
    name: str = ""

    @property
    def roomy(self) -> bool:
        """Whether it has shared memory for three stages; other GPUs have 99 KiB for a program."""
        return self.capability in (80, 90, 100, 103)


HOPPER = Device(90, 132)


def device_of(x: Tensor) -> Device:
    """The GPU that holds `x`; one of Hopper's kind for a tensor that is on none."""
    return _properties(x.device.index) if x.is_cuda else HOPPER


@functools.cache
def _properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    return Device(capability, found.multi_processor_count, found.name)


def precision(dtype: torch.dtype, *, exact: bool = False) -> str:
    """How `tl.dot` multiplies: its `input_precision`, which means something for float32 alone.

    Args:
        dtype: Dtype of the factors, before any conversion. Half precision that a kernel has
            converted keeps its digits, in three products of TensorFloat-32.
        exact: Whether cancellation needs all digits: where torch allows TensorFloat-32, three
            products are taken.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return "tf32x3"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32x3" if exact else "tf32"
    return "ieee"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel on the device of its first tensor, on the current stream.

    Args:
        kernel: A function compiled by `triton.jit`.
        grid: Number of programs in each of up to three dimensions; none run if one is zero.
        args: In the order of the kernel's parameters: tensors, numbers, and tuples of these.
        warps: Warps of each program.
        stages: Stages of the software pipeline; two at most where shared memory is small.
        constants: Parameters that are `tl.constexpr`, in their order, and options of the compiler.
    """
    if 0 in grid:
        return
    first = _first_tensor(args)
    if not device_of(first).roomy:
        stages = min(stages, 2)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        compiled = kernel[grid](*args, **constants, **options)
    values = (value for name, value in constants.items() if name in kernel.arg_names)
    launched(compiled, grid, (*args, *values))


def _first_tensor(args: tuple[Any, ...]) -> Any:
    for x in args:
        if isinstance(x, TensorDescriptor):
            return x.base
        found = _first_tensor(x) if type(x) is tuple else x if isinstance(x, Tensor) else None
        if found is not None:
            return found
    return None
