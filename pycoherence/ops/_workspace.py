"""How much memory an op may take beside its arguments and results."""

import torch

from pycoherence.ops._backends import NATIVE_NAMESPACE, load_native

_bytes = 64 * 2**20


def set_workspace(size: int) -> None:
    """Set how many bytes an op may use for intermediate results, in all threads of the process.

    Ops that work through the batch in parts choose these as large as fits, and at least one
    example's gradient or factors, whatever that takes. Results are the same up to rounding.

    Args:
        size: Bytes, positive; 64 MiB (`64 * 2**20`) to begin with.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is not positive.

    Example:
        >>> import pycoherence as pc
        >>> before = pc.workspace()
        >>> pc.set_workspace(256 * 2**20)
        >>> pc.workspace() // 2**20
        256
        >>> pc.set_workspace(before)
    """
    global _bytes
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"expected a workspace of an integer number of bytes, got {size!r}")
    if size < 1:
        raise ValueError(f"expected a workspace of one or more bytes, got {size}")
    _bytes = size
    for device, setter in (("cpu", "set_workspace"), ("cuda", "set_cuda_workspace")):
        if load_native(device) is None:
            getattr(getattr(torch.ops, NATIVE_NAMESPACE), setter)(size)


def workspace() -> int:
    """The bytes that an op may use for intermediate results; see `set_workspace`."""
    return _bytes
