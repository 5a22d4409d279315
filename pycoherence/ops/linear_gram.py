"""Dot products of per-example gradients of a linear layer's weight."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.register import register
from pycoherence.ops.family.gram import gram_spec
from pycoherence.ops.family.reduce import randn
from pycoherence.ops.linear_reduce import check, like, materialise


def linear_gram(
    x1: Tensor, g1: Tensor, x2: Tensor | None = None, g2: Tensor | None = None
) -> Tensor:
    r"""All dot products of per-example weight gradients of a linear layer.

    .. math:: K_{bc} = \langle G_b, G'_c \rangle, \qquad G_b = \sum_t g_{bt} x_{bt}^\top

    where `G` are the gradients of the first batch and `G'` those of the second.

    Scaling: `G_b` is the gradient of what `g1` was taken of. With `g1` and `g2` from means of
    per-example losses, multiply by `B1 * B2`.

    Args:
        x1: Layer input of the first batch, `[B1, T1, I]`, float16/bfloat16/float32/float64, any
            strides.
        g1: Gradient with respect to its output, `[B1, T1, O]`, same dtype and device.
        x2: Layer input of the second batch, `[B2, T2, I]`; `T2` may differ from `T1`. The first
            batch itself if `None`.
        g2: Gradient with respect to its output, `[B2, T2, O]`; given if and only if `x2` is.

    Returns:
        `[B1, B2]`, float32, or float64 for float64 inputs. Zero-length `B1` or `B2` gives an empty
        matrix, other zero lengths give zeros.

    Raises:
        ValueError: Shapes disagree, or one of `x2` and `g2` is missing.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: On the reference path `2 B T I O` for the gradients, with a workspace full of those of
    each batch, and `2 B1 B2 I O` for their products. On a GPU (triton) the same, with a
    workspace full of both batches, or `2 B1 T1 B2 T2 (I + O)`, half of it for a batch with itself,
    and the memory of a few Gram matrices of the batch, whichever is cheaper.

    Errors against float64, of the largest number: 1e-5, or 1e-12 for float64. On a GPU where torch
    allows TensorFloat-32 and gradients are multiplied, 4e-3 (expected, not measured).

    Source: Fort et al. 2019, arXiv:1901.09491, and Chatterjee 2020, arXiv:2002.10657, for its use.

    Example:
        >>> import torch, pycoherence as pc
        >>> x, g = torch.ones(2, 5, 3), torch.ones(2, 5, 4)
        >>> g[1] = -1
        >>> pc.ops.linear_gram(x, g)
        tensor([[ 300., -300.],
                [-300.,  300.]])
    """
    return call("linear_gram", x1, g1, x2, g2)


def _shape(x: Tensor, g: Tensor) -> tuple[int, int]:
    return like(x, g)[1]


def _materialise(x1: Tensor, g1: Tensor, x2: Tensor, g2: Tensor) -> tuple[Chunks, Chunks]:
    return materialise(x1, g1), materialise(x2, g2)


def _pairs(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    for b1, b2, t1, t2, i, o in (
        (3, 5, 17, 9, 33, 5),
        (5, 3, 1, 1, 7, 19),
        (1, 1, 1, 1, 1, 1),
        (2, 3, 130, 1, 4, 70),
        (0, 2, 3, 2, 4, 5),
        (4, 3, 0, 2, 3, 2),
        (3, 2, 2, 2, 0, 5),
    ):
        yield (
            randn(b1, t1, i, device=device, dtype=dtype),
            randn(b1, t1, o, device=device, dtype=dtype, seed=2),
            randn(b2, t2, i, device=device, dtype=dtype, seed=3),
            randn(b2, t2, o, device=device, dtype=dtype, seed=4),
        )
    x1, x2 = (randn(6, 13, 4, device=device, dtype=dtype, seed=s).permute(2, 1, 0) for s in (0, 3))
    g1, g2 = (randn(4, 13, 18, device=device, dtype=dtype, seed=s)[:, :, ::2] for s in (2, 4))
    yield x1, g1, x2, g2


SPEC = register(
    gram_spec(
        "linear_gram",
        "x",
        "",
        check=check,
        shape=_shape,
        materialise=_materialise,
        pairs=_pairs,
    )
)
