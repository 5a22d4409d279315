"""Normal numbers that nobody can predict."""

import os
from collections.abc import Callable, Sequence
from math import pi, prod

import torch
from torch import Tensor

Normal = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""A function that gives standard normal numbers of a shape, dtype and device."""

_CHUNK = 1 << 20
_TERMS = 4


def secure_normal(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Standard normal numbers from the operating system's generator of secrets.

    .. math:: \tfrac12 (z_1 + z_2 + z_3 + z_4), \qquad z_i \sim \mathcal{N}(0, 1)

    Torch's generators repeat themselves to whoever knows their seed or enough of their numbers.
    These numbers come from `os.urandom`, which nobody can predict or repeat, and there is no seed.
    Each is a sum of four numbers, made in float64 by Box and Muller's method: floating-point normal
    numbers have gaps, which tell a value with noise from one without, and sums of several close
    nearly all of them. That makes the known attack expensive; it is no proof. A proof needs noise
    from a discrete distribution, which this is not.

    Give the function itself as `generator` to `pycoherence.NormClip` and its kin.

    Args:
        shape: The shape of the result.
        dtype: Its dtype, a floating one.
        device: Its device. The numbers are made on the CPU.

    Returns:
        A tensor of this shape, dtype and device.

    Cost: 32 random bytes for each number, and the logarithms: some fifty times `torch.randn`.

    Source: Holohan and Braghin 2021, arXiv:2107.10138, for the sum; Canonne et al. 2020,
    arXiv:2004.00010, for discrete noise.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.secure_normal((1000,)).std().round().item()
        1.0
        >>> rule = pc.NormClip(1.0, noise_multiplier=1.1, generator=pc.secure_normal)
    """
    n = prod(shape)
    parts = [_sums(min(_CHUNK, n - start)) for start in range(0, n, _CHUNK)]
    found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    return found.to(dtype).reshape(tuple(shape)).to(device)


def _sums(n: int) -> Tensor:
    pairs = -(-n // 2)
    u, v = _uniform(_TERMS * 2 * pairs).view(2, _TERMS, pairs)
    radius, angle = (-2 * u.log()).sqrt(), 2 * pi * v
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :n].sum(0) / _TERMS**0.5


def _uniform(n: int) -> Tensor:
    """Numbers between zero, which is none of them, and one."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * n)), dtype=torch.int64)
    return ((bits & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
