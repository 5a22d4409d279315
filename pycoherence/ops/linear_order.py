"""Robust aggregates of per-example gradients of a linear layer's weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.dispatch import unavailable
from pycoherence.ops.core.register import register
from pycoherence.ops.dense_order import row_order
from pycoherence.ops.family.order import order, order_reference, order_spec
from pycoherence.ops.family.reduce import randn
from pycoherence.ops.linear_reduce import check, heads, like, materialise


def linear_order(
    x: Tensor, g: Tensor, rule: str, k: float = 0, *, nonfinite: str = "nan"
) -> Tensor:
    r"""A robust aggregate of the per-example weight gradients of a linear layer, by coordinate.

    .. math:: A_{oi} = \mathrm{rule}_k(G_{1oi}, \dots, G_{Boi}), \qquad
        G_b = \sum_t g_{bt} x_{bt}^\top \in \mathbb{R}^{O \times I}

    The rules are those of `dense_order`: `winsorized_mean`, `trimmed_mean`, `median`,
    `lower_median`, `median_of_means`, `sign_agreement`, `phocas` and `meamed`.

    Scaling: A mean of the gradients `G_b` of what `g` was taken of: multiply by `B` for what
    stands in for the ordinary weight gradient, their sum.

    Args:
        x: Layer input, `[B, T, I]`, float16/bfloat16/float32/float64, any strides.
        g: Gradient with respect to the layer output, `[B, T, O]`, same dtype and device.
        rule: Name of the rule, as of `dense_order`.
        k: Its number, as of `dense_order`.
        nonfinite: Effect of NaN and Inf in a `G_b`, as of `dense_order`: `"nan"` or `"drop"`.

    Returns:
        `[O, I]`, float32, or float64 for float64 inputs. Zero-length `B` or `T` gives zeros.

    Raises:
        ValueError: Shapes disagree, the rule is unknown, `k` is out of its range, or `nonfinite`
            is neither of the two.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: On the reference path the FLOPs of the weight gradient and a sort of `B` values for each
    of `O I` coordinates, some output features at a time (the workspace, or one). On a GPU with one
    position (native) no gradient is stored: values are products of factors in shared memory, made
    anew whenever `dense_order` would read them. With more (triton) the gradients are materialised
    likewise, and `dense_order` takes them; `sign_agreement` and `median_of_means` keep sums in
    place of gradients, the former without a sort, unless values are dropped. With one position
    `sign_agreement` is two products of matrices (triton).

    Errors against float64, of the largest value: 1e-5, or 1e-12 for float64. For float32 on a
    GPU where torch allows TensorFloat-32, with more than one position or `sign_agreement`, 4e-3
    (expected, not measured); in
    `sign_agreement` a sign, in `phocas` and `meamed` what is near, may change where it is nearly a
    tie.

    Source: See `dense_order`.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(4, 1, 3), torch.tensor([1.0, 2.0, 4.0, 1e30]).view(4, 1, 1)
        >>> pc.ops.linear_order(x, g, "winsorized_mean", 1)
        tensor([[3., 3., 3.]])
    """
    return order("linear_order", x, g, rule=rule, k=k, nonfinite=nonfinite)


def _reference(x: Tensor, g: Tensor, rule: str, k: float, drop: bool) -> Tensor:
    def rows(part: slice) -> Chunks:
        return materialise(x, g[:, :, part])

    return order_reference(rows, *like(x, g), rule, k, drop)


def _heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    yield from heads(device, dtype)
    for b, t, i, o in ((37, 1, 5, 3), (130, 2, 3, 2)):
        x = randn(b, t, i, device=device, dtype=dtype)
        yield x, randn(b, t, o, device=device, dtype=dtype, seed=2)


def _native(x: Tensor, g: Tensor, rule: str, k: float, drop: bool) -> str | None:
    if x.is_cuda and x.shape[1] > 1:
        return f"the CUDA kernel takes one position, got {x.shape[1]}"
    signs = x.is_cuda and rule == "sign_agreement" and not drop
    if signs and unavailable("linear_order", "triton", "cuda") is None:
        return "two products of matrices should take a tenth of its time (predicted)"
    return None


SPEC = register(
    order_spec(
        "linear_order(Tensor x, Tensor g",
        check=check,
        like=like,
        reference=_reference,
        heads=_heads,
        supports={"native": _native},
        helper=row_order,
    )
)
