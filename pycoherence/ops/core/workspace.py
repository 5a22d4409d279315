"""How much memory an op may take beside its arguments and results."""

import functools

import torch

from pycoherence.ops.core.dispatch import NATIVE_NAMESPACE, load_native

_LEAST = 64 * 2**20
_SHARE = 128
"""A GPU gives its memory divided by this: small parts of the work would leave it idle."""

_bytes: int | None = None


def set_workspace(size: int | None) -> None:
    """Set how many bytes an op may use for intermediate results, in all threads of the process.

    Ops that work through the batch in parts choose these as large as fits, and at least one
    example's gradient or factors, whatever that takes. Results are the same up to rounding.

    Args:
        size: Bytes, positive. `None` is what there is to begin with: 64 MiB (`64 * 2**20`); for
            kernels in Triton, and for gradients made example by example on a GPU, a 128th of its
            memory, if that is more.

    Raises:
        TypeError: It is neither an integer nor `None`.
        ValueError: It is not positive, or not less than `2**63`.

    Example:
        >>> import pycoherence as pc
        >>> pc.set_workspace(256 * 2**20)
        >>> pc.workspace() // 2**20
        256
        >>> pc.set_workspace(None)
        >>> pc.workspace() // 2**20
        64
    """
    global _bytes
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise TypeError(f"expected a workspace of an integer number of bytes, got {size!r}")
    if size is not None and not 1 <= size < 2**63:
        raise ValueError(f"expected a workspace of 1 to 2**63 - 1 bytes, got {size}")
    for device, setter in (("cpu", "set_workspace"), ("cuda", "set_cuda_workspace")):
        if load_native(device) is None:
            getattr(getattr(torch.ops, NATIVE_NAMESPACE), setter)(size or _LEAST)
    _bytes = size


def workspace(device: torch.device | None = None) -> int:
    """How many bytes an op may use for intermediate results; see `set_workspace`.

    Args:
        device: The device on which they lie; the CPU if it is not given.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.workspace() == pc.workspace(torch.device("cpu")) == 64 * 2**20
        True
    """
    if _bytes is not None:
        return _bytes
    if device is None or device.type != "cuda":
        return _LEAST
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_gpu(index: int) -> int:
    return max(_LEAST, torch.cuda.get_device_properties(index).total_memory // _SHARE)
