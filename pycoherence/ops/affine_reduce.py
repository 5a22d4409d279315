"""Reductions over per-example gradients of scales, shifts and biases."""

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


def affine_reduce(
    g: Tensor,
    x: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    want: Sequence[str] = ("sq_norms",),
) -> Reduced:
    r"""Reductions over the per-example gradients of a scale or of a shift, one number per channel.

    .. math::
        G_b = \sum_t g_{bt} \odot \hat{x}_{bt} \in \mathbb{R}^{C}, \qquad
        \hat{x} = (x - \mathrm{mean}) \cdot \mathrm{rstd}

    Without `x`, the gradient of a shift or bias: `G_b = sum_t g_bt`. With it, that of a scale;
    a normalisation layer is told by its statistics, so that its output need not be kept.

    Scaling: as `linear_reduce`.

    Args:
        g: Gradient with respect to the layer output, `[B, T, C]`, floating, any strides.
        x: The input that is normalised and scaled, `[B, T, C]`, or `None`.
        mean: Subtracted from `x`; broadcastable to `[B, T, C]`; zero if `None`.
        rstd: Multiplied to `x - mean`; broadcastable to `[B, T, C]`; one if `None`.
        coef: `[B]`, the weights of `weighted_sum`; ones if `None`.
        direction: `[C]`, what `dots` are taken with.
        want: Names of the outputs to compute, fields of `Reduced`.

    Returns:
        `Reduced`, with `None` for what was not wanted. Zero-length `B` or `T` gives empty or zeros.

    Raises:
        ValueError: Shapes disagree, `mean` or `rstd` come without `x`, `want` names no output, or
            `coef`/`direction` do not fit it.
        TypeError: Dtypes or devices differ, or a dtype is not floating.

    Cost: One read of `g` and `x`. Memory of `[B, C]` (native), of a few of them (triton: sums of
    parts of the positions), or of the workspace or one example's factors (reference).

    Errors against float64, of the largest number of an output: 1e-5, or 1e-12 for float64. For
    `gram` on a GPU where torch allows TensorFloat-32, 4e-3 (expected, not measured).

    Source: Gray et al. 2024, arXiv:2411.00999, for the norms of layer normalisation.

    Example:
        >>> import torch, pycoherence as pc
        >>> pc.ops.affine_reduce(torch.ones(2, 5, 3)).sq_norms
        tensor([75., 75.])
    """
    out = call("affine_reduce", g, x, mean, rstd, coef, direction, mask(want))
    return unpack(out)


def _check(op: str, g: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> None:
    if g.dim() != 3 or (x is not None and x.shape != g.shape):
        got = "" if x is None else f" and x {tuple(x.shape)}"
        raise ValueError(
            f"{op}: expected g [B, T, C], and x like it if given, got g {tuple(g.shape)}{got}; "
            "flatten positions into T, or unsqueeze(1) if there are none"
        )
    check_factors(op, g=g, **({} if x is None else {"x": x}))
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value is None:
            continue
        if x is None:
            raise ValueError(f"{op}: {name} was given without x; give both, or neither for a shift")
        if value.dim() != 3 or any(
            size not in (1, full) for size, full in zip(value.shape, g.shape, strict=True)
        ):
            raise ValueError(
                f"{op}: expected {name} to broadcast to {tuple(g.shape)}, got {tuple(value.shape)}"
            )
        if not value.is_floating_point() or value.device != g.device:
            raise TypeError(
                f"{op}: expected {name} to be floating on {g.device}, "
                f"got {value.dtype} on {value.device}"
            )


def _like(
    g: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, tuple[int]]:
    return g, (g.shape[2],)


def materialise(g: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> Chunks:
    """The gradients of one batch."""
    acc = accumulate_dtype(g.dtype)
    mean, rstd = (None if s is None else s.to(acc).expand(g.shape) for s in (mean, rstd))

    def gradients(part: slice) -> Tensor:
        rows = g[part].to(acc)
        if x is not None:
            normal = x[part].to(acc)
            normal = normal if mean is None else normal - mean[part]
            normal = normal if rstd is None else normal * rstd[part]
            rows = rows * normal
        return rows.sum(1)  # [b, C]

    return Chunks.of(gradients, g.shape[0], g.shape[1] * g.shape[2], acc)


def _reference(
    g: Tensor, x: Tensor | None, mean: Tensor | None, rstd: Tensor | None, *tail: Any
) -> tuple[Tensor | None, ...]:
    return reduce_reference(materialise(g, x, mean, rstd), g, (g.shape[2],), *tail)


def _heads(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    acc = accumulate_dtype(dtype)
    for b, t, c in ((3, 17, 33), (5, 1, 7), (1, 1, 1), (0, 3, 4), (4, 0, 3)):
        g = randn(b, t, c, device=device, dtype=dtype)
        x = randn(b, t, c, device=device, dtype=dtype, seed=2)
        per_position = randn(b, t, 1, device=device, dtype=acc, seed=3)
        yield g, None, None, None
        yield g, x, None, per_position
        yield g, x, per_position, per_position.abs()
    g, x = (randn(4, 6, 10, device=device, dtype=dtype, seed=s).mT[:, ::2] for s in (0, 1))
    per_channel = randn(4, 1, 6, device=device, dtype=acc, seed=3)
    yield g, x, per_channel, per_channel.abs()
    yield g, x, per_channel[:1], None


SPEC = register(
    reduce_spec(
        "affine_reduce(Tensor g, Tensor? x, Tensor? mean, Tensor? rstd",
        check=_check,
        like=_like,
        reference=_reference,
        heads=_heads,
    )
)
