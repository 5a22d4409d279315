"""The options of torch's convolutions, and what an output position sees."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def per_dim(value: int | Sequence[int], n: int, name: str) -> list[int]:
    """One number for each of `n` spatial dimensions."""
    values = [value] * n if isinstance(value, int) else list(value)
    values = values * n if len(values) == 1 else values
    if len(values) != n:
        raise ValueError(f"conv: expected {name} of one or {n} numbers, got {tuple(values)}")
    return values


def resolve_padding(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: int | str | Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Turn any padding of torch's convolutions into a symmetric one.

    `"same"` may need one more zero on the far side, which is then put into the returned input.
    """
    n = len(kernel_size)
    if not isinstance(padding, str):
        return x, per_dim(padding, n, "padding")
    if padding == "valid":
        return x, [0] * n
    if padding != "same" or any(s != 1 for s in stride):
        raise ValueError(
            f"conv: expected padding to be numbers, 'valid', or 'same' with stride 1, "
            f"got {padding!r} with stride {tuple(stride)}"
        )
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return x, [t // 2 for t in total]


def positions_out(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Output positions along each spatial dimension."""
    options = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in options]


def patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The patch that each output position sees: `[B, I, *S]` to `[B, I, *S_out, *kernel_size]`."""
    x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    for dim, (k, step, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, d * (k - 1) + 1, step)[..., ::d]
    return x


def conv_shape(x: Tensor, g: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, ...]:
    """The shape of the weight."""
    return g.shape[1], x.shape[1] // groups, *kernel_size
