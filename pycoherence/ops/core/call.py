"""How the library calls its own ops, in less time than torch's dispatcher takes."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pycoherence.ops.core import dispatch
from pycoherence.ops.core.mistakes import raise_explained
from pycoherence.ops.core.register import specs
from pycoherence.ops.core.spec import Outputs, device_type, tensors_of

_PLAIN = (Tensor, Parameter)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would only pass an op's arguments on: no gradient, trace or mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or any(type(x) not in _PLAIN or x.is_meta or _is_lazy(x) for x in tensors_of(args))
    )


def _is_lazy(x: Tensor) -> bool:
    """Whether the memory of a tensor does not hold its numbers, as the dispatcher would see to."""
    return x.is_neg() or x._is_zerotensor()


def call(op: str, *args: Any) -> Any:
    """Run an op, past torch's dispatcher where that saves time and changes nothing."""
    spec = specs[op]
    try:
        if not _is_plain(args):
            return getattr(torch.ops.pycoherence, op)(*args)
        spec.check(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return dispatch.select(spec, device_type(args), args).kernel(*args)
    except Exception as error:
        raise_explained(spec, args, error)


@functools.cache
def _settled(op: str, device: str) -> Callable[..., Any] | None:
    """The kernel that runs for all arguments if no backend is forced; `None` if they matter."""
    fast = dispatch.fast_backends(op, device)
    settled = fast and fast[0] not in specs[op].supports
    return dispatch.kernel_of(op, fast[0], specs[op].helper) if settled else None


def _kernel_for(op: str, device: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    found = _settled(op, device) if dispatch.forced_backend() is None else None
    return found or dispatch.select(specs[op], device, args).kernel


def call_unchecked(op: str, *args: Any) -> Any:
    """Run an op on arguments that are known to be right, where no gradient is recorded."""
    first = args[0]
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or type(first) is not Tensor:
        return call(op, *args)
    # Small models spend much of their time from here to the kernel, so what can be is looked up;
    # to ask a tensor for its device takes longer than the look-up.
    device = "cpu" if first.is_cpu else first.device.type
    # Triton reads the memory as it is.
    raw = device != "cpu" or dispatch.forced_backend() is not None
    if raw and any(map(_is_lazy, tensors_of(args))):
        return call(op, *args)
    try:
        return _kernel_for(op, device, args)(*args)
    except RuntimeError as error:
        raise_explained(specs[op], args, error)


def call_together(
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    dtypes: Sequence[torch.dtype | None],
    norms: bool,
) -> list[tuple[Outputs, Tensor | None]]:
    """Run several `*_reduce` ops unchecked, with fewer launches if all run on Triton.

    Args:
        calls: The name and the arguments of each.
        dtypes: For each, the dtype that the sum of gradients may have instead of its own.
        norms: Whether numbers are welcome whose squares add up to the squared norm of the sum.

    Returns:
        The outputs of each op, and such numbers or `None`.
    """
    found: list[tuple[Any, tuple[Any, ...]]] = []
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    for op, args in () if traced else calls:
        plain = type(args[0]) is Tensor and not any(map(_is_lazy, tensors_of(args)))
        kernel = _kernel_for(op, device_type(args), args) if plain else None
        if not hasattr(kernel, "begin"):
            break
        found.append((kernel, args))
    if len(found) < len(calls):
        return [(call_unchecked(op, *args), None) for op, args in calls]
    # Triton is imported with the first kernel of its own.
    return importlib.import_module("pycoherence.triton_kernels.launch.together").together(
        found, dtypes, norms
    )
