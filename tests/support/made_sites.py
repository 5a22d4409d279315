"""Sites of parameters of a shape, with random factors in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites import AffineSite, ConvSite, EmbeddingSite, LinearSite, Site
from support.backends import assert_reduced_close
from support.materialised import reductions


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(shape: Sequence[int], b: int) -> Site:
    return LinearSite(randn(b, 3, shape[1]), randn(b, 3, shape[0]))


def shift(shape: Sequence[int], b: int) -> Site:
    return AffineSite(randn(b, 2, torch.Size(shape).numel()), shape=tuple(shape))


def scale(shape: Sequence[int], b: int) -> Site:
    n = torch.Size(shape).numel()
    return AffineSite(randn(b, 2, n), randn(b, 2, n), shape=tuple(shape))


def table(shape: Sequence[int], b: int) -> Site:
    return EmbeddingSite(torch.randint(shape[0], (b, 4)), randn(b, 4, shape[1]), shape[0], 0)


def conv(shape: Sequence[int], b: int) -> Site:
    out, channels, *kernel = shape
    x, g = randn(b, channels, *[k + 2 for k in kernel]), randn(b, out, *[3 for _ in kernel])
    ones = [1] * len(kernel)
    return ConvSite(x, g, kernel, ones, [0] * len(kernel), ones, 1)


def assert_reduces(site: Site, rows: Tensor, tolerance: float = 1e-10) -> None:
    """All outputs together, one example without weight; and sums without weights."""
    coef, direction = randn(len(rows)), randn(*rows.shape[1:])
    coef[:1] = 0
    sums = ("weighted_sum", "sum_dots")
    for want, c, v in ((Reduced._fields, coef, direction), (sums, None, None)):
        actual = site.reduce(want, coef=c, direction=v)
        assert_reduced_close(actual, reductions(rows, want, c, v), tolerance)
