"""A running average of the points that point its way, from their dot products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import OpSpec, accumulate_dtype
from pycoherence.ops.family.reduce import check_factors, randn

# A number and a sign for each fit into the shared memory of any GPU.
_MOST_ON_CUDA = 6000


def gram_filter(gram: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""Weights of the running average that takes in only points which point its way.

    .. math:: z \leftarrow g_1, \qquad z \leftarrow \tfrac12 (z + g_b) = \sum_b w_b g_b \
        \text{ if } \ 1 - \cos(z, g_b) \le \tau, \ \text{ for } b = 2, \dots, B

    The cosine with a point that vanishes is taken as zero. If none agrees with the first, no point
    has a weight.

    Scaling: none; the weights add up to one.

    Args:
        gram: Dot products, `[B, B]`, float16/bfloat16/float32/float64, any strides.
        kept: Which points count, `[B]`, bool, on the same device; numbers of the others are not
            looked at.
        threshold: `tau`.

    Returns:
        The weights `[B]`, and which points were taken in, `[B]`, one or zero; float32, or float64
        for float64 inputs. They are worked out in float64.

    Raises:
        ValueError: Shapes disagree.
        TypeError: `gram` is not floating, or `kept` not bool on its device.

    Cost: A row of `gram` read for each point taken in, one after the other; on CUDA by one block.

    Source: Chaubard et al. 2024, arXiv:2412.18052.

    Example:
        >>> import torch, pycoherence as pc
        >>> points = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [2.0, 1.0]])
        >>> kept = torch.ones(4, dtype=torch.bool)
        >>> pc.ops.gram_filter(points @ points.T, kept, 0.9)
        (tensor([0.5000, 0.0000, 0.0000, 0.5000]), tensor([1., 0., 0., 1.]))
    """
    return call("gram_filter", gram, kept, threshold)


def _check(gram: Tensor, kept: Tensor, threshold: float) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or kept.shape != gram.shape[:1]:
        raise ValueError(
            "gram_filter: expected gram [B, B] and kept [B], got "
            f"{tuple(gram.shape)} and {tuple(kept.shape)}"
        )
    check_factors("gram_filter", gram=gram)
    if kept.dtype != torch.bool or kept.device != gram.device:
        raise TypeError(
            f"gram_filter: expected kept to be bool on {gram.device}, got {kept.dtype} on "
            f"{kept.device}"
        )


def _reference(gram: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(gram.dtype)
    if not len(gram):
        return gram.new_zeros(0, dtype=acc), gram.new_zeros(0, dtype=acc)
    gram = torch.where(kept[:, None] & kept, gram.double(), 0.0)
    norms = gram.diagonal().sqrt()
    first = kept.byte().argmax(0, keepdim=True)
    others = kept.scatter(0, first, False)
    products, sq_norm = gram[first][0], norms[first][0] ** 2
    taken, squares, zero = list[Tensor](), norms**2, torch.zeros_like(norms[0])
    for b, row in enumerate(gram):
        product, scale = products[b], sq_norm.sqrt() * norms[b]
        cosine = torch.where(scale == 0, zero, product / scale)
        takes = others[b] & (1 - cosine <= threshold)
        products = torch.where(takes, (products + row) / 2, products)
        sq_norm = torch.where(takes, (sq_norm + 2 * product + squares[b]) / 4, sq_norm)
        taken.append(takes)
    # Each that is taken in weighs half, and halves those before.
    agree = torch.stack(taken)
    weights = torch.where(agree, 0.5, torch.ones_like(norms)).flip(0).cumprod(0).flip(0)
    chosen = agree.scatter(0, first, True) & agree.any()
    return torch.where(chosen, weights, 0.0).to(acc), chosen.to(acc)


def _fake(gram: Tensor, kept: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(gram.dtype)
    return gram.new_empty(gram.shape[:1], dtype=dtype), gram.new_empty(gram.shape[:1], dtype=dtype)


def _native(gram: Tensor, kept: Tensor, threshold: float) -> str | None:
    if gram.is_cuda and len(gram) > _MOST_ON_CUDA:
        return f"shared memory has room for {_MOST_ON_CUDA} points"
    return None


def _samples(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, float]]:
    for batch in (5, 1, 0, 33, 130):
        rows = randn(batch, 3, device=device, dtype=torch.float64, seed=batch)
        gram = (rows @ rows.mT).to(dtype)
        kept = torch.arange(batch, device=device) % 5 != 3
        yield gram, torch.ones_like(kept), 0.9
        yield gram.mT, kept, 0.4
        gram = gram.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
        yield gram.masked_fill(~(kept & kept[:, None]), torch.inf), kept, 1.7
    yield torch.zeros(4, 4, dtype=dtype, device=device), torch.zeros_like(kept[:4]), 1.0


SPEC = register(
    OpSpec(
        schema="gram_filter(Tensor gram, Tensor kept, float threshold) -> (Tensor, Tensor)",
        check=_check,
        reference=_reference,
        fake=_fake,
        samples=_samples,
        supports={"native": _native},
    )
)
