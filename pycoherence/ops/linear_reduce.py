"""Reductions over per-example gradients of a linear layer's weight."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.outputs import Reduced, mask, unpack
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.family.reduce import check_factors, randn, reduce_reference, reduce_spec


def linear_reduce(
    x: Tensor,
    g: Tensor,
    *,
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    want: Sequence[str] = ("sq_norms",),
) -> Reduced:
    r"""Reductions over the per-example weight gradients of a linear layer, without keeping them.

    .. math:: G_b = \sum_t g_{bt} x_{bt}^\top \in \mathbb{R}^{O \times I}

    Scaling: `G_b` is the gradient of what `g` was taken of. With `g` from a mean of per-example
    losses, multiply `sq_norms` and `second_moment` by `B**2` and `dots` by `B`.

    Args:
        x: Layer input, `[B, T, I]`, float16/bfloat16/float32/float64, any strides.
        g: Gradient with respect to the layer output, `[B, T, O]`, same dtype and device.
        coef: `[B]`, the weights of `weighted_sum`; ones if `None`.
        direction: `[O, I]`, what `dots` are taken with.
        want: Names of the outputs to compute, fields of `Reduced`. All come from one pass.

    Returns:
        `Reduced`, with `None` for what was not wanted. Zero-length `B` or `T` gives empty or zeros.

    Raises:
        ValueError: Shapes disagree, `want` names no output, or `coef`/`direction` do not fit it.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: The FLOPs of the ordinary weight gradient, `2BTIO`. For `T = 1`, `sq_norms` alone take
    `O(B (I + O))`. Memory for the factors of one example in each thread (native), for partial sums
    within the workspace, a number for each example and tile of the weight and, for dots, `B T O /
    64` numbers (triton), or for the workspace or one example's gradient (reference); outside of
    triton also for a copy of factors whose dtype is half.

    Errors against float64, of the largest number of an output: 1e-5, or 1e-12 for float64. For
    float32 on a GPU where torch allows TensorFloat-32, 4e-3 (expected, not measured). The sign of a
    number that is as small as its error may differ.

    Source: Goodfellow 2015, arXiv:1510.01799, for the `T = 1` norms.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(2, 5, 3), torch.ones(2, 5, 4)
        >>> pc.ops.linear_reduce(x, g).sq_norms
        tensor([300., 300.])
    """
    return unpack(call("linear_reduce", x, g, coef, direction, mask(want)))


def check(op: str, x: Tensor, g: Tensor) -> None:
    """Check the factors of one batch."""
    if x.dim() != 3 or g.dim() != 3 or x.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"{op}: expected x [B, T, I] and g [B, T, O], got {tuple(x.shape)} and "
            f"{tuple(g.shape)}; flatten positions into T, or unsqueeze(1) if there are none"
        )
    check_factors(op, x=x, g=g)


def like(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The output gradient and the shape of the weight."""
    return g, (g.shape[2], x.shape[2])


def materialise(x: Tensor, g: Tensor) -> Chunks:
    """The gradients of one batch."""
    acc = accumulate_dtype(x.dtype)

    def gradients(part: slice) -> Tensor:
        return torch.bmm(g[part].mT.to(acc), x[part].to(acc))  # [b, O, I]

    return Chunks.of(gradients, x.shape[0], g.shape[2] * x.shape[2], acc)


def _reference(x: Tensor, g: Tensor, *tail: Any) -> tuple[Tensor | None, ...]:
    return reduce_reference(materialise(x, g), *like(x, g), *tail)


def heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample factors, with their options."""
    for b, t, i, o in (
        (3, 17, 33, 5),
        (5, 1, 7, 19),
        (1, 1, 1, 1),
        (2, 130, 4, 70),
        (0, 3, 4, 5),
        (4, 0, 3, 2),
        (3, 2, 0, 5),
    ):
        x = randn(b, t, i, device=device, dtype=dtype)
        yield x, randn(b, t, o, device=device, dtype=dtype, seed=2)
    x = randn(6, 13, 4, device=device, dtype=dtype).permute(2, 1, 0)
    yield x, randn(4, 13, 18, device=device, dtype=dtype, seed=2)[:, :, ::2]


SPEC = register(
    reduce_spec(
        "linear_reduce(Tensor x, Tensor g",
        check=check,
        like=like,
        reference=_reference,
        heads=heads,
    )
)
