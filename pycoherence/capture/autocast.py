"""Casts of arguments as torch's autocast makes them, done where the capture sees it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pycoherence.capture.facts import tensors

Cast = Callable[[Tensor, torch.dtype], Tensor]
Refuse = Callable[[str, str], NoReturn]

# From torch's lists, which name some of these for one kind of device and some for another.
_LOWER = {
    *("linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "prelu", "scaled_dot_product_attention"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}
_FLOAT32 = {"layer_norm", "group_norm", "rms_norm", "pow"}
_WIDEST = {"bilinear", "addcmul"}
_AS_THEY_ARE = {
    *("add", "sub", "mul", "div", "truediv", "true_divide", "multiply", "subtract", "divide"),
    *("add_", "sub_", "mul_", "div_", "true_divide_", "multiply_", "subtract_", "divide_", "pow_"),
    *("iadd", "isub", "imul", "itruediv", "radd", "rsub", "rmul", "rtruediv", "where", "lerp"),
    *("expand", "expand_as", "broadcast_to", "repeat"),
    *("embedding", "embedding_bag", "batch_norm", "instance_norm"),
}
_ALIASES = {"rmatmul": "matmul", "rpow": "pow"}


def is_autocast_enabled() -> bool:
    """Whether autocast is enabled for any kind of device."""
    return torch._C._is_any_autocast_enabled()


def autocast_device(*values: Any) -> str | None:
    """The kind of device of a tensor for which autocast is enabled."""
    if not is_autocast_enabled():
        return None
    for x in tensors(values):
        if torch.is_autocast_enabled(x.device.type):
            return x.device.type
    return None


def without_autocast(*values: Any) -> AbstractContextManager[Any]:
    """A context in which autocast is disabled for these tensors."""
    device = autocast_device(*values)
    return nullcontext() if device is None else torch.autocast(device, enabled=False)


def same_autocast(*values: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Gives contexts in which autocast is what it is now for these tensors."""
    device = autocast_device(*values)
    if device is None:
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    return functools.partial(torch.autocast, device, dtype, cache_enabled=False)


def expect_no_autocast(x: Tensor, refuse: Refuse) -> None:
    """Refuse a function if autocast is on and its effect on the arguments is not known."""
    if autocast_device(x) is not None:
        refuse(
            "what autocast would make of its arguments is not known",
            f"call it in a block of torch.autocast({x.device.type!r}, enabled=False)",
        )


@contextmanager
def autocast_done(
    func: Callable[..., Any] | None, arguments: tuple[Any, Any], cast: Cast
) -> Iterator[tuple[Any, Any]]:
    """The arguments of a function as autocast would give them to it, with autocast disabled.

    The arguments of an unknown function stay as they are, and autocast stays enabled.

    Args:
        func: The function.
        arguments: Its `args` and `kwargs`.
        cast: Gives a tensor another dtype.
    """
    device = autocast_device(arguments)
    name = _name(func)
    if device is None or name not in _LOWER | _FLOAT32 | _WIDEST | _AS_THEY_ARE:
        yield arguments
        return
    eligible = [x.dtype for x in tensors(arguments) if _is_eligible(x, device)]
    dtype = _dtype(name, device, eligible)
    if dtype is not None:

        def change(x: Any) -> Any:
            return cast(x, dtype) if _is_eligible(x, device) and x.dtype != dtype else x

        arguments = tree_map(change, arguments)
    with torch.autocast(device, enabled=False):
        yield arguments


def _name(func: Callable[..., Any] | None) -> str:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        name = name.strip("_")
    return _ALIASES.get(name, name)


def _is_eligible(x: Any, device: str) -> bool:
    is_float = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return is_float and x.device.type == device


def _dtype(name: str, device: str, found: list[torch.dtype]) -> torch.dtype | None:
    # On the CPU einsum is not in the list, but what it is made of is.
    if name in _AS_THEY_ARE or not (name == "einsum" or _is_listed(name, device)):
        return None
    if name in _LOWER:
        return torch.get_autocast_dtype(device)
    if name in _FLOAT32 or torch.float32 in found:
        return torch.float32
    return torch.get_autocast_dtype(device)


@functools.cache
def _is_listed(name: str, device: str) -> bool:
    """Whether autocast has something to do with a function on this kind of device."""
    key, op = f"Autocast{device.upper()}", getattr(torch.ops.aten, name, None)
    overloads = [] if op is None else [getattr(op, overload).name() for overload in op.overloads()]
    known = set(torch._C._dispatch_get_all_op_names())  # TorchScript has some more
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(overload, key) for overload in overloads if overload in known)
