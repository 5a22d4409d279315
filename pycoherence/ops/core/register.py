"""From an `OpSpec` to `torch.ops.pycoherence.<op>`."""

import functools
import importlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pycoherence.ops.core import dispatch
from pycoherence.ops.core.dispatch import NATIVE_NAMESPACE, pick
from pycoherence.ops.core.mistakes import raise_explained
from pycoherence.ops.core.spec import OpSpec, Outputs, tensors_of

NAMESPACE = "pycoherence"

specs: dict[str, OpSpec] = {}
"""Every registered op, by name."""

_public = torch.library.Library(NAMESPACE, "FRAGMENT")
_native = torch.library.Library(NATIVE_NAMESPACE, "FRAGMENT")


def _device_type(args: tuple[Any, ...]) -> str:
    """The kind of device of the first tensor, which is an op's first argument or in it."""
    first = args[0]
    return (first if isinstance(first, Tensor) else first[0]).device.type


def register(spec: OpSpec) -> OpSpec:
    """Define the op for torch: schemas, picker, fake kernel, and a backward that raises."""
    for library in (_public, _native):
        library.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), spec.name).default

    def run(*args: Any) -> Outputs:
        spec.check(*args)
        try:
            return pick(spec, _device_type(args), args)(*args)
        except RuntimeError as error:
            raise_explained(spec, args, error)

    def fake(*args: Any) -> Outputs:
        spec.check(*args)
        return spec.fake(*args)

    # torch.library.register_autograd would do the same at four times the cost of a call.
    def autograd(*args: Any) -> Outputs:
        backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if backward or forward_ad._current_level >= 0:
            # A list hides its tensors from torch.
            sizes = [len(x) if isinstance(x, list) else None for x in args]
            flat = [y for x in args for y in (x if isinstance(x, list) else [x])]
            return _NotDifferentiable.apply(op, sizes, *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _public.impl(spec.name, run, "CompositeExplicitAutograd")
    _public.impl(spec.name, autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", fake, lib=_public)
    specs[spec.name] = spec
    return spec


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


def invoke(op: str, *args: Any) -> Any:
    """Run an op, past torch's dispatcher where that saves time and changes nothing."""
    spec = specs[op]
    try:
        if not _is_plain(args):
            return getattr(torch.ops.pycoherence, op)(*args)
        spec.check(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return pick(spec, _device_type(args), args)(*args)
    except Exception as error:
        raise_explained(spec, args, error)


@functools.cache
def _settled(op: str, device: str) -> Callable[..., Any] | None:
    """The kernel that runs for all arguments if no backend is forced; `None` if they matter."""
    fast = dispatch._fast_backends(op, device)
    settled = fast and fast[0] not in specs[op].supports
    return dispatch._kernel(op, fast[0]) if settled else None


def _kernel_for(op: str, device: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    found = _settled(op, device) if dispatch._forced is None else None
    return found or pick(specs[op], device, args)


def execute(op: str, *args: Any) -> Any:
    """Run an op on arguments that are known to be right, where no gradient is recorded."""
    first = args[0]
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or type(first) is not Tensor:
        return invoke(op, *args)
    # Small models spend much of their time from here to the kernel, so what can be is looked up;
    # to ask a tensor for its device takes longer than the look-up.
    device = "cpu" if first.is_cpu else first.device.type
    raw = device != "cpu" or dispatch._forced is not None  # Triton reads the memory as it is
    if raw and any(map(_is_lazy, tensors_of(args))):
        return invoke(op, *args)
    try:
        return _kernel_for(op, device, args)(*args)
    except RuntimeError as error:
        raise_explained(specs[op], args, error)


def execute_together(
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    dtypes: Sequence[torch.dtype | None],
    norms: bool,
) -> list[tuple[Outputs, Tensor | None]]:
    """Run several `*_reduce` ops as `execute` does, with fewer launches if all run on Triton.

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
        kernel = _kernel_for(op, _device_type(args), args) if plain else None
        if not hasattr(kernel, "begin"):
            break
        found.append((kernel, args))
    if len(found) < len(calls):
        return [(execute(op, *args), None) for op, args in calls]
    # Triton is imported with the first kernel of its own.
    return importlib.import_module("pycoherence.triton_kernels.launch.together").together(
        found, dtypes, norms
    )


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, sizes: list[int | None], *flat: Any) -> Outputs:
        ctx.op, rest = op, iter(flat)
        args = [next(rest) if n is None else list(islice(rest, n)) for n in sizes]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{ctx.op} is not differentiable; call it under torch.no_grad() or on x.detach()"
        )
