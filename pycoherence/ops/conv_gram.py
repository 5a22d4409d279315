"""Dot products of per-example gradients of a convolution's weight."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.conv_reduce import check, like, materialise
from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.family.conv import per_dim, positions_out, resolve_padding
from pycoherence.ops.family.gram import gram_spec
from pycoherence.ops.family.reduce import randn


def conv_gram(
    x1: Tensor,
    g1: Tensor,
    kernel_size: Sequence[int],
    x2: Tensor | None = None,
    g2: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""All dot products of per-example weight gradients of a convolution.

    .. math:: K_{bc} = \langle G_b, G'_c \rangle, \qquad
        G_b = \sum_p g_{b \cdot p} \, \mathrm{patch}_p(x_b)^\top

    where `p` runs over the output positions, `G` are the gradients of the first batch and `G'`
    those of the second. One to four spatial dimensions.

    Scaling: as `linear_gram`.

    Args:
        x1: Layer input of the first batch, `[B1, I, *S]`, floating, any strides.
        g1: Gradient with respect to its output, `[B1, O, *S_out]`, same dtype and device.
        kernel_size: `(K_1, ..., K_n)`.
        x2: Layer input of the second batch, `[B2, I, *S']`; its size may differ. The first batch
            itself if `None`.
        g2: Gradient with respect to its output; given if and only if `x2` is.
        stride: One number or one for each spatial dimension; so are `padding` and `dilation`.
        padding: Zeros on both sides, or `"valid"`, or `"same"` (stride 1 only, as in torch).
        dilation: Spacing of the kernel points.
        groups: Groups of channels.

    Returns:
        `[B1, B2]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes or options disagree, or one of `x2` and `g2` is missing.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: On the reference path the FLOPs of the weight gradient for the gradients, with a
    workspace full of those of each batch, and `2 B1 B2` times their size for the products. On a GPU
    (triton) the same, with a workspace full of both batches, and copies of factors that do not lie
    channels last.

    Errors against float64: as `linear_gram` where gradients are multiplied.

    Source: See `linear_gram`.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(2, 1, 4, 4), torch.ones(2, 5, 2, 2)
        >>> pc.ops.conv_gram(x, g, (3, 3), 2 * x, g)
        tensor([[1440., 1440.],
                [1440., 1440.]])
    """
    n = len(kernel_size)
    strides, dilations = per_dim(stride, n, "stride"), per_dim(dilation, n, "dilation")
    x1, pads = resolve_padding(x1, kernel_size, strides, padding, dilations)
    if x2 is not None:
        x2, _ = resolve_padding(x2, kernel_size, strides, padding, dilations)
    return call("conv_gram", x1, g1, x2, g2, list(kernel_size), strides, pads, dilations, groups)


def _shape(x: Tensor, g: Tensor, *options: Any) -> tuple[int, ...]:
    return like(x, g, *options)[1]


def _materialise(
    x1: Tensor, g1: Tensor, x2: Tensor, g2: Tensor, *options: Any
) -> tuple[Chunks, Chunks]:
    return materialise(x1, g1, *options), materialise(x2, g2, *options)


def _pairs(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # B1, B2, I, O, then both sizes and the window (kernel_size, stride, padding, dilation), groups
    for b1, b2, i, o, s1, s2, window, groups in (
        (3, 2, 4, 6, [9], [7], ([3], [2], [1], [2]), 2),
        (2, 3, 3, 5, [7, 6], [7, 6], ([3, 2], [1, 1], [1, 0], [1, 1]), 1),
        (3, 2, 4, 4, [6, 5], [4, 5], ([3, 3], [2, 1], [0, 2], [1, 2]), 4),
        (2, 1, 2, 3, [3, 4, 3], [2, 4, 3], ([2, 1, 2], [1, 2, 1], [1, 0, 1], [1, 1, 1]), 1),
        (1, 1, 1, 1, [1, 1], [1, 1], ([1, 1], [1, 1], [0, 0], [1, 1]), 1),
        (0, 2, 2, 3, [4], [4], ([3], [1], [0], [1]), 1),
    ):
        factors = []
        for b, s, seed in ((b1, s1, 0), (b2, s2, 3)):
            x = randn(b, i, *s, device=device, dtype=dtype, seed=seed)
            if x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            out = positions_out(s, *window)
            factors += [x, randn(b, o, *out, device=device, dtype=dtype, seed=seed + 2)]
        yield *factors, *window, groups


SPEC = register(
    gram_spec(
        "conv_gram",
        "x",
        ", int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups",
        check=check,
        shape=_shape,
        materialise=_materialise,
        pairs=_pairs,
    )
)
