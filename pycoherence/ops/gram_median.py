"""The geometric median of points whose dot products are known."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.register import register
from pycoherence.ops.core.spec import OpSpec, accumulate_dtype
from pycoherence.ops.family.reduce import check_factors, randn

# Two numbers for each fit into the shared memory of any GPU.
_MOST_ON_CUDA = 6000


def gram_median(
    gram: Tensor, kept: Tensor, nu: float, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    r"""Weights of the geometric median of points, from their dot products.

    .. math:: z = \sum_b w_b g_b, \qquad w \leftarrow \frac{\beta}{\sum_b \beta_b}, \quad
        \beta_b = \frac{1}{\max(\nu, \lVert g_b - z \rVert)}

    from equal weights, until the sum of the distances changes by no more than `tolerance` of it.

    Scaling: of `nu` that of the `g_b`; the weights add up to one.

    Args:
        gram: Dot products, `[B, B]`, float16/bfloat16/float32/float64, any strides.
        kept: Which points count, `[B]`, bool, on the same device; numbers of the others are not
            looked at.
        nu: Smallest distance.
        tolerance: When to stop.
        iterations: When to stop at the latest, one or more.

    Returns:
        The weights `[B]`, zero for points that do not count, and the number of iterations, of no
        dimension; float32, or float64 for float64 inputs. They are worked out in float64.

    Raises:
        ValueError: Shapes disagree, or there is no iteration.
        TypeError: `gram` is not floating, or `kept` not bool on its device.

    Cost: `B^2` numbers read in each iteration; on CUDA by a single block, which nothing waits for.

    Source: Pillutla et al. 2019, arXiv:1912.13445.

    Example:
        >>> import torch, pycoherence as pc
        >>> points = torch.tensor([[0.0], [1.0], [100.0]])
        >>> kept = torch.ones(3, dtype=torch.bool)
        >>> weights, _ = pc.ops.gram_median(points @ points.T, kept, 1e-6, 1e-6, 100)
        >>> (weights @ points).round(decimals=2)
        tensor([1.])
    """
    return call("gram_median", gram, kept, nu, tolerance, iterations)


def _check(gram: Tensor, kept: Tensor, nu: float, tolerance: float, iterations: int) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or kept.shape != gram.shape[:1]:
        raise ValueError(
            "gram_median: expected gram [B, B] and kept [B], got "
            f"{tuple(gram.shape)} and {tuple(kept.shape)}"
        )
    if iterations < 1:
        raise ValueError(f"gram_median: expected one iteration or more, got {iterations}")
    check_factors("gram_median", gram=gram)
    if kept.dtype != torch.bool or kept.device != gram.device:
        raise TypeError(
            f"gram_median: expected kept to be bool on {gram.device}, got {kept.dtype} on "
            f"{kept.device}"
        )


def _reference(
    gram: Tensor, kept: Tensor, nu: float, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(gram.dtype)
    gram = torch.where(kept[:, None] & kept, gram.double(), 0.0)
    weights, ran = weiszfeld(gram, kept.double(), nu, tolerance, iterations)
    return weights.to(acc), ran.to(acc)


def weiszfeld(
    gram: Tensor, counts: Tensor, nu: float, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The same for points that count more or less: `beta_b` and the distances are multiplied by it.

    Args:
        gram: Dot products in float64, `[B, B]`; zeros where a point does not count.
        counts: How much each point counts, `[B]`, float64, zero or more.
        nu: The argument of `gram_median`, like the others.
        tolerance: See there.
        iterations: See there.
    """
    total = counts.sum()
    weights = counts / torch.where(total == 0, 1.0, total)
    distances = _distances(gram, weights)
    done, ran = (torch.zeros_like(total, dtype=dtype) for dtype in (torch.bool, torch.float64))
    for _ in range(iterations):
        beta = counts / distances.clamp(min=nu)
        total = beta.sum()
        found = beta / torch.where(total == 0, 1.0, total)
        reached = _distances(gram, found)
        before, after = (counts * distances).sum(), (counts * reached).sum()
        weights, distances = (
            torch.where(done, old, new) for old, new in ((weights, found), (distances, reached))
        )
        ran = ran + ~done
        done = done | ((before - after).abs() <= tolerance * before)
    return weights, ran


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    products = (gram * weights).sum(1)
    squares = gram.diagonal() - 2 * products + (weights * products).sum()
    return squares.clamp(min=0).sqrt()


def _fake(
    gram: Tensor, kept: Tensor, nu: float, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(gram.dtype)
    return gram.new_empty(gram.shape[:1], dtype=dtype), gram.new_empty((), dtype=dtype)


def _native(gram: Tensor, kept: Tensor, nu: float, tolerance: float, iterations: int) -> str | None:
    if gram.is_cuda and len(gram) > _MOST_ON_CUDA:
        return f"shared memory has room for {_MOST_ON_CUDA} points"
    return None


def _samples(
    device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, float, float, int]]:
    for batch in (5, 1, 0, 33, 130):
        rows = randn(batch, 7, device=device, dtype=torch.float64, seed=batch)
        gram = (rows @ rows.mT).to(dtype)
        kept = torch.arange(batch, device=device) % 5 != 3
        yield gram, torch.ones_like(kept), 1e-3, 1e-4, 20
        yield gram.mT, kept, 0.1, 0.0, 3
        gram = gram.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]
        yield gram.masked_fill(~(kept & kept[:, None]), torch.inf), kept, 1e-3, 1e-4, 20
    yield torch.zeros(4, 4, dtype=dtype, device=device), torch.zeros_like(kept[:4]), 1.0, 0.0, 2


SPEC = register(
    OpSpec(
        schema=(
            "gram_median(Tensor gram, Tensor kept, float nu, float tolerance, int iterations)"
            " -> (Tensor, Tensor)"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        samples=_samples,
        supports={"native": _native},
    )
)
