"""All examples and a slice of the parameter, from own examples and the whole parameter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.ranks import needs_gloo, run_ranks
from torch import Tensor

import pycoherence as pc
from pycoherence.ranks import Ranks, ranks_of
from pycoherence.sites import (
    AffineSite,
    ConvSite,
    EmbeddingSite,
    LinearSite,
    Part,
    PartsSite,
    ShiftedSite,
    Site,
    exchange,
)

SIZES = {1: (3,), 2: (3, 4), 3: (4, 0, 3), 4: (1, 2, 5, 2)}


class Draw:
    """Factors of all examples, and those of one rank: whole numbers, whose sums do not round."""

    def __init__(self, sizes: tuple[int, ...], rank: int | None) -> None:
        self.batch, start = sum(sizes), sum(sizes[: rank or 0])
        self.part = slice(None) if rank is None else slice(start, start + sizes[rank])
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        x = torch.randn(self.batch, *shape, generator=self.generator, dtype=torch.float64)
        return (4 * x[self.part]).round().to(dtype)

    def ids(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, (self.batch, *shape), generator=self.generator)[self.part]

    def fixed(self, *shape: int) -> Tensor:
        return (4 * torch.randn(shape, generator=self.generator, dtype=torch.float64)).round()


def conv(d: Draw, shape: tuple[int, int], groups: int, *, n: int = 6) -> ConvSite:
    o, i = shape
    window = ([3, 2], [1, 2], [1, 0], [1, 1], groups)
    return ConvSite(d.normal(i, 5, n), d.normal(o, 5, (n - 2) // 2 + 1), *window)


def cases(d: Draw) -> Iterator[tuple[str, Site, tuple[int, ...]]]:
    """The name of a parameter, its site and its shape."""
    yield "tall", LinearSite(d.normal(3), d.normal(7)), (7, 3)
    yield "wide", LinearSite(d.normal(2, 7), d.normal(2, 3)), (3, 7)
    yield "long", LinearSite(d.normal(40, 5), d.normal(40, 4)), (4, 5)
    yield "few outputs", LinearSite(d.normal(5), d.normal(1)), (1, 5)
    yield "shaped", LinearSite(d.normal(6), d.normal(4), (4, 2, 3)), (4, 2, 3)
    half = torch.bfloat16
    yield "half", LinearSite(d.normal(3, dtype=half), d.normal(7, dtype=half)), (7, 3)
    yield "conv", conv(d, (5, 3), 1), (5, 3, 3, 2)
    yield "conv of many inputs", conv(d, (2, 7), 1), (2, 7, 3, 2)
    yield "groups", conv(d, (6, 3), 3), (6, 1, 3, 2)
    yield "small image", conv(d, (64, 64), 1, n=2), (64, 64, 3, 2)
    yield "table", EmbeddingSite(d.ids(4, high=9), d.normal(4, 5), 9, 2), (9, 5)
    yield "bias", AffineSite(d.normal(4, 5)), (5,)
    scale = AffineSite(d.normal(2, 6), d.normal(2, 6), d.normal(2, 1), d.normal(2, 1), (2, 3))
    yield "scale", scale, (2, 3)
    left = Part(LinearSite(d.normal(2), d.normal(4)), (4, 2), (5, 1), 0)
    right = Part(LinearSite(d.normal(3), d.normal(4)), (4, 3), (5, 1), 2)
    yield "parts", PartsSite((left, right), (4, 5)), (4, 5)
    inner = LinearSite(d.normal(3), d.normal(4))
    shifted = ShiftedSite(inner, d.fixed().abs(), d.normal(), d.fixed(4, 3))
    yield "shifted", shifted, (4, 3)


def gram_and_median(ranks: Ranks, name: str, site: Site, shape: tuple[int, ...]) -> Any:
    batch = sum(SIZES[ranks.size])
    gram, median = torch.zeros(batch, batch, dtype=torch.float64), torch.zeros(shape).double()
    for found in exchange(site, ranks, name):
        part = found.site.reduce(("gram",)).gram
        assert part is not None
        gram += part
        found.put(median, found.site.order("median", 0, False).double())
    return ranks.total(gram), ranks.total(median)


def check(rank: int, world: int, workspace: int | None) -> None:
    ranks = ranks_of(torch.distributed.group.WORLD)
    assert ranks is not None
    pc.set_workspace(workspace)
    sizes = SIZES[world]
    wholes = cases(Draw(sizes, None))
    for (name, site, shape), (_, whole, _) in zip(cases(Draw(sizes, rank)), wholes, strict=True):
        gram, median = gram_and_median(ranks, name, site, shape)
        expected = whole.reduce(("gram",)).gram
        assert expected is not None
        assert gram.equal(expected.double()), name
        assert median.equal(whole.order("median", 0, False).double()), name
    pc.set_workspace(None)


@needs_gloo
@pytest.mark.parametrize("workspace", [None, 256])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_slices_are_those_of_all_examples(world: int, workspace: int | None) -> None:
    run_ranks(world, check, world, workspace)
