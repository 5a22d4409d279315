"""Robust aggregates of per-example gradients of a convolution's weight."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.conv_reduce import check, heads, like, materialise
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.dense_order import row_order
from pycoherence.ops.family.conv import per_dim, resolve_padding
from pycoherence.ops.family.order import order, order_reference, order_spec
from pycoherence.ops.family.reduce import randn


def conv_order(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    rule: str,
    k: float = 0,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    nonfinite: str = "nan",
) -> Tensor:
    r"""A robust aggregate of the per-example weight gradients of a convolution, by coordinate.

    .. math:: A_j = \mathrm{rule}_k(G_{1j}, \dots, G_{Bj}), \qquad
        G_b = \sum_p g_{b \cdot p} \, \mathrm{patch}_p(x_b)^\top

    where `p` runs over the output positions and `j` over the numbers of the weight. One to four
    spatial dimensions. The rules are those of `dense_order`.

    Scaling: See `linear_order`.

    Args:
        x: Layer input, `[B, I, *S]`, floating, any strides.
        g: Gradient with respect to the layer output, `[B, O, *S_out]`, same dtype and device.
        kernel_size: `(K_1, ..., K_n)`.
        rule: Name of the rule, as of `dense_order`.
        k: Its number, as of `dense_order`.
        stride: One number or one for each spatial dimension; so are `padding` and `dilation`.
        padding: Zeros on both sides, or `"valid"`, or `"same"` (stride 1 only, as in torch).
        dilation: Spacing of the kernel points.
        groups: Groups of channels.
        nonfinite: Effect of NaN and Inf in a `G_b`, as of `dense_order`: `"nan"` or `"drop"`.

    Returns:
        `[O, I / groups, *kernel_size]`, float32, or float64 for float64 inputs.

    Raises:
        ValueError: Shapes or options disagree, the rule is unknown, `k` is out of its range, or
            `nonfinite` is neither of the two.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: On the reference path the FLOPs of the weight gradient and a sort of `B` values for each
    coordinate, some output channels at a time (the workspace, or one), each time with bounded
    chunks of the batch unfolded anew. On a GPU (triton) as `linear_order`, with nothing unfolded
    and copies of factors that do not lie channels last.

    Errors against float64: as `linear_order`.

    Source: See `dense_order`.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(3, 1, 4, 4), torch.ones(3, 1, 3, 3)
        >>> g[1] = -1e30
        >>> pc.ops.conv_order(x, g, (2, 2), "median")
        tensor([[[[9., 9.],
                  [9., 9.]]]])
    """
    n = len(kernel_size)
    strides, dilations = per_dim(stride, n, "stride"), per_dim(dilation, n, "dilation")
    x, pads = resolve_padding(x, kernel_size, strides, padding, dilations)
    head = (x, g, list(kernel_size), strides, pads, dilations, groups)
    return order("conv_order", *head, rule=rule, k=k, nonfinite=nonfinite)


def _reference(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *tail: Any,
) -> Tensor:
    window = (kernel_size, stride, padding, dilation)
    per_group, seen = max(1, g.shape[1] // groups), x.shape[1] // groups

    def rows(part: slice) -> Chunks:
        first, last = part.start // per_group, -(-part.stop // per_group)
        inputs = x[:, first * seen : last * seen]
        return materialise(inputs, g[:, part], *window, last - first)

    return order_reference(rows, *like(x, g, *window, groups), *tail, unit=per_group)


def _heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    yield from heads(device, dtype)
    x, g = (randn(20, c, 5, device=device, dtype=dtype, seed=c) for c in (2, 4))
    yield x, g[..., :3], [3], [1], [0], [1], 2


SPEC = register(
    order_spec(
        "conv_order(Tensor x, Tensor g, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups",
        check=check,
        like=like,
        reference=_reference,
        heads=_heads,
        helper=row_order,
    )
)
