"""Reductions over per-example gradients of a convolution's weight."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.outputs import Reduced, mask, unpack
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.family.conv import conv_shape, patches, per_dim, positions_out, resolve_padding
from pycoherence.ops.family.reduce import check_factors, randn, reduce_reference, reduce_spec


def conv_reduce(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    want: Sequence[str] = ("sq_norms",),
) -> Reduced:
    r"""Reductions over the per-example weight gradients of a convolution, without keeping them.

    .. math:: G_b = \sum_p g_{b \cdot p} \, \mathrm{patch}_p(x_b)^\top
        \in \mathbb{R}^{O \times I / \mathrm{groups} \times K_1 \times \dots \times K_n}

    where `p` runs over the output positions. One to four spatial dimensions.

    Scaling: as `linear_reduce`.

    Args:
        x: Layer input, `[B, I, *S]`, floating, any strides.
        g: Gradient with respect to the layer output, `[B, O, *S_out]`, same dtype and device.
        kernel_size: `(K_1, ..., K_n)`.
        stride: One number or one for each spatial dimension; so are `padding` and `dilation`.
        padding: Zeros on both sides, or `"valid"`, or `"same"` (stride 1 only, as in torch).
        dilation: Spacing of the kernel points.
        groups: Groups of channels.
        coef: `[B]`, the weights of `weighted_sum`; ones if `None`.
        direction: `[O, I / groups, *kernel_size]`, what `dots` are taken with.
        want: Names of the outputs to compute, fields of `Reduced`.

    Returns:
        `Reduced`, with `None` for what was not wanted.

    Raises:
        ValueError: Shapes or options disagree, `want` names no output, or `coef`/`direction` do
            not fit it.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: The FLOPs of the ordinary weight gradient. The reference path unfolds a bounded chunk of
    the batch (the workspace, or one example). On a GPU (triton) nothing is unfolded: partial sums
    within the workspace, a number for each example and tile of the weight, and copies of `x` and
    `g` that do not lie channels last. Depthwise convolutions have nothing copied, but their
    gradients within the workspace.

    Errors against float64: as `linear_reduce`. The setting is torch's for products of matrices.

    Source: Rochette et al. 2019, arXiv:1912.06015.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(2, 1, 4, 4), torch.ones(2, 5, 4, 4)
        >>> pc.ops.conv_reduce(x, g, (3, 3), padding="same").weighted_sum is None
        True
    """
    n = len(kernel_size)
    strides, dilations = per_dim(stride, n, "stride"), per_dim(dilation, n, "dilation")
    x, pads = resolve_padding(x, kernel_size, strides, padding, dilations)
    out = call(
        "conv_reduce",
        x,
        g,
        list(kernel_size),
        strides,
        pads,
        dilations,
        groups,
        coef,
        direction,
        mask(want),
    )
    return unpack(out)


_LARGE = 2**31
"""Kernels multiply the options of a convolution with each other."""


def check(
    op: str,
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    """Check the factors of one batch."""
    n = len(kernel_size)
    # Several inputs of a 3-d convolution are one input with a fourth dimension.
    if n not in (1, 2, 3, 4) or not len(stride) == len(padding) == len(dilation) == n:
        raise ValueError(
            f"{op}: expected kernel_size, stride, padding and dilation of 1 to 4 numbers each, "
            f"got {kernel_size}, {stride}, {padding}, {dilation}"
        )
    if min(*kernel_size, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            f"{op}: expected positive kernel_size, stride, dilation, groups, and padding >= 0, "
            f"got {kernel_size}, {stride}, {dilation}, {groups}, {padding}"
        )
    if max(*kernel_size, *stride, *dilation, *padding, groups) >= _LARGE:
        raise ValueError(
            f"{op}: expected kernel_size, stride, dilation, padding and groups below 2**31, got "
            f"{kernel_size}, {stride}, {dilation}, {padding}, {groups}"
        )
    if x.dim() != n + 2 or g.dim() != n + 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            f"{op}: expected x [B, I, *S] and g [B, O, *S_out] with {n} spatial dimensions, "
            f"got {tuple(x.shape)} and {tuple(g.shape)}"
        )
    if x.shape[1] % groups or g.shape[1] % groups:
        raise ValueError(
            f"{op}: expected channels divisible by groups={groups}, "
            f"got {x.shape[1]} in and {g.shape[1]} out"
        )
    out = positions_out(x.shape[2:], kernel_size, stride, padding, dilation)
    if min(out) < 1:
        raise ValueError(
            f"{op}: kernel {kernel_size} with dilation {dilation} is larger than the padded input, "
            f"x {tuple(x.shape)} with padding {padding}"
        )
    if list(g.shape[2:]) != out:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} with these options has output positions {out}, "
            f"but g is {tuple(g.shape)}"
        )
    check_factors(op, x=x, g=g)


def like(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, tuple[int, ...]]:
    """The output gradient and the shape of the weight."""
    return g, conv_shape(x, g, kernel_size, groups)


def materialise(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Chunks:
    """The gradients of one batch."""
    window = (kernel_size, stride, padding, dilation)
    acc, (_, shape) = accumulate_dtype(x.dtype), like(x, g, *window, groups)
    positions, taps = prod(g.shape[2:]), prod(kernel_size)

    def gradients(part: slice) -> Tensor:
        seen = patches(x[part].to(acc), *window)
        b = len(seen)
        seen = seen.reshape(b, groups, shape[1], positions, taps)
        grads = g[part].to(acc).reshape(b, groups, shape[0] // groups, positions)
        return torch.einsum("bgop,bgipk->bgoik", grads, seen).reshape(b, *shape)

    elements = max(prod(shape), x.shape[1] * positions * taps)
    return Chunks.of(gradients, x.shape[0], elements, acc)


def _reference(x: Tensor, g: Tensor, *options_and_tail: Any) -> tuple[Tensor | None, ...]:
    options, tail = options_and_tail[:5], options_and_tail[5:]
    return reduce_reference(materialise(x, g, *options), *like(x, g, *options), *tail)


def heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Sample factors, with their options."""
    # B, I, O, then size and window (kernel_size, stride, padding, dilation), then groups
    for b, i, o, s, window, groups in (
        (3, 4, 6, [9], ([3], [2], [1], [2]), 2),
        (2, 3, 5, [7, 6], ([3, 2], [1, 1], [1, 0], [1, 1]), 1),
        (3, 4, 4, [6, 5], ([3, 3], [2, 1], [0, 2], [1, 2]), 4),
        (2, 2, 3, [3, 4, 3], ([2, 1, 2], [1, 2, 1], [1, 0, 1], [1, 1, 1]), 1),
        (3, 4, 2, [2, 3, 2, 3], ([1, 2, 1, 2], [1, 1, 1, 2], [0, 1, 0, 1], [1, 1, 1, 2]), 2),
        (1, 1, 1, [1, 1], ([1, 1], [1, 1], [0, 0], [1, 1]), 1),
        (0, 2, 3, [4], ([3], [1], [0], [1]), 1),
    ):
        x = randn(b, i, *s, device=device, dtype=dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        g = randn(b, o, *positions_out(s, *window), device=device, dtype=dtype, seed=2)
        yield x, g, *window, groups


SPEC = register(
    reduce_spec(
        "conv_reduce(Tensor x, Tensor g, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups",
        check=check,
        like=like,
        reference=_reference,
        heads=heads,
    )
)
