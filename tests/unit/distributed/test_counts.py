"""Everything that a rank receives is counted, and compared with formulas."""

from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pycoherence as pc
from bench.distributed import formulas
from bench.distributed.formulas import Parameter, Parameters, Place, Received
from bench.distributed.traffic import Traffic, counted

SIZES = {2: (5, 5), 3: (3, 3, 3), 4: (2, 2, 2, 2)}
UNEVEN = {2: (2, 5), 3: (4, 0, 3), 4: (1, 2, 5, 2)}
DIVISIBLE, ODD = (12, 24, 12), (7, 5, 11)
"""Widths of which 2, 3 and 4 ranks have slices of one size, and others."""


class Way(NamedTuple):
    """Something to count.

    Attributes:
        open: Makes the block around a pass of a model.
        expected: The formula of what a rank receives in it.
        wrapped: Whether DistributedDataParallel is around the model.
        synced: Whether it averages gradients in the pass.
    """

    open: Callable[[nn.Module], Any]
    expected: Callable[[Parameters, Place], Received]
    wrapped: bool = False
    synced: bool = True


def collecting(*statistics: pc.statistics.Statistic) -> Callable[[nn.Module], Any]:
    return lambda model: pc.collect(model, *statistics, group=dist.group.WORLD)


def aggregating(rule: pc.robust.Rule) -> Callable[[nn.Module], Any]:
    return lambda model: pc.aggregate(model, rule, group=dist.group.WORLD)


joined = partial(formulas.coordinate_rule, averaged=False)
left = partial(formulas.coordinate_rule, averaged=True)
"""Slices are joined by one more sum, or left to the wrapper, which alone sends gradients then."""

chosen = partial(formulas.krum, m=2)
chosen_each = partial(formulas.krum, m=2, per_parameter=True)

WAYS = {
    "SqNorms": Way(collecting(pc.SqNorms()), formulas.sq_norms),
    "SqNorms, wrapped": Way(collecting(pc.SqNorms()), formulas.sq_norms, wrapped=True),
    "Gram": Way(collecting(pc.Gram()), formulas.gram),
    "Moments": Way(collecting(pc.Moments()), formulas.moments),
    "Dots": Way(collecting(pc.Dots("mean")), formulas.dots_with_mean),
    "Winsorized": Way(aggregating(pc.Winsorized(1)), joined),
    "Winsorized, wrapped": Way(aggregating(pc.Winsorized(1)), left, wrapped=True),
    "Winsorized, kept": Way(aggregating(pc.Winsorized(1)), joined, wrapped=True, synced=False),
    "Krum": Way(aggregating(pc.Krum(1, m=2)), chosen),
    "Krum, wrapped": Way(aggregating(pc.Krum(1, m=2)), chosen, wrapped=True),
    "Krum of each": Way(aggregating(pc.Krum(1, m=2, per="parameter")), chosen_each),
    "NormClip": Way(aggregating(pc.NormClip(1.0)), formulas.norm_clip),
    "NormClip, wrapped": Way(aggregating(pc.NormClip(1.0)), formulas.norm_clip, wrapped=True),
    "NormClip, noisy": Way(
        aggregating(pc.NormClip(1.0, noise_multiplier=0.1)), partial(formulas.norm_clip, noise=True)
    ),
}


def parameters(widths: tuple[int, ...], positions: int) -> Parameters:
    shapes = [shape for i, o in pairwise(widths) for shape in ((o, i), (o, None))]
    return [Parameter(*shape, positions=positions) for shape in shapes]


def net(widths: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths))).to(dtype)


def examples(at: Place, width: int, positions: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(at.sizes[at.rank], *[positions] * (positions > 1), width).to(dtype)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def count(
    way: Way, at: Place, widths: tuple[int, ...], positions: int, dtype: torch.dtype = torch.float64
) -> Traffic:
    model = net(widths, dtype)
    if way.wrapped:
        model = DistributedDataParallel(model)
    x = examples(at, widths[0], positions, dtype)
    still = nullcontext() if way.synced else model.no_sync()  # type: ignore[operator]
    with counted() as found, still, way.open(model):
        loss(model, x).backward()
    return found


def compare(found: Traffic, expected: Received, at: Place, name: str) -> None:
    assert found.numbers == expected.numbers, name
    assert found.headers == expected.headers, name
    assert found.header_bytes == expected.headers * (at.ranks - 1) * formulas.WIDTH * 8, name


def check(rank: int, sizes: tuple[int, ...], widths: tuple[int, ...]) -> None:
    at = Place(sizes, rank)
    for positions in (1, 40):
        weights = parameters(widths, positions)
        for name, way in WAYS.items():
            found, expected = count(way, at, widths, positions), way.expected(weights, at)
            compare(found, expected, at, f"{name}, {positions} positions")
            assert found.bytes == 8 * expected.numbers


@needs_gloo
@pytest.mark.parametrize("sizes", SIZES.values())
def test_ranks_receive_what_formulas_say(sizes: tuple[int, ...]) -> None:
    run_ranks(len(sizes), check, sizes, DIVISIBLE)


@needs_gloo
@pytest.mark.parametrize("sizes", UNEVEN.values())
def test_slices_and_batches_of_several_sizes(sizes: tuple[int, ...]) -> None:
    run_ranks(len(sizes), check, sizes, ODD)


def check_dtypes(rank: int, sizes: tuple[int, ...]) -> None:
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        at = Place(sizes, rank, short=Fraction(itemsize, 4))
        for positions in (1, 6, 12, 40):
            for name in ("SqNorms", "Gram", "Winsorized", "Winsorized, wrapped"):
                way = WAYS[name]
                found = count(way, at, DIVISIBLE, positions, dtype)
                expected = way.expected(parameters(DIVISIBLE, positions), at)
                compare(found, expected, at, name)
                assert found.bytes == expected.bytes(itemsize), f"{name}, {dtype}, {positions}"


@needs_gloo
def test_half_as_many_bytes_make_another_way_the_cheapest() -> None:
    run_ranks(2, check_dtypes, SIZES[2])


def check_workspace(rank: int, sizes: tuple[int, ...]) -> None:
    """To take a slice in parts is to receive the same."""
    at = Place(sizes, rank)
    for positions in (1, 40):
        for name in ("Gram", "Winsorized"):
            before = count(WAYS[name], at, DIVISIBLE, positions)
            pc.set_workspace(256)
            after = count(WAYS[name], at, DIVISIBLE, positions)
            pc.set_workspace(None)
            assert after.calls["all_to_all_single"] > before.calls["all_to_all_single"]
            assert (after.numbers, after.headers) == (before.numbers, before.headers)


@needs_gloo
def test_parts_are_no_more_than_the_whole() -> None:
    run_ranks(2, check_workspace, SIZES[2])


def check_padding(rank: int, sizes: tuple[int, ...]) -> None:
    """All send as many positions as the rank that has most."""
    at, positions = Place(sizes, rank), 2 + rank
    for name in ("Gram", "Winsorized"):
        found = count(WAYS[name], at, DIVISIBLE, positions)
        compare(found, WAYS[name].expected(parameters(DIVISIBLE, 1 + at.ranks), at), at, name)
        assert found.calls["broadcast"] + found.calls["all_gather"] == 2  # one for each weight


@needs_gloo
def test_texts_of_several_lengths() -> None:
    run_ranks(2, check_padding, SIZES[2])


def check_weighted_sum(rank: int, sizes: tuple[int, ...]) -> None:
    at, model = Place(sizes, rank), net(DIVISIBLE, torch.float64)
    x = examples(at, DIVISIBLE[0], 1, torch.float64)
    with counted() as found:
        pc.weighted_sum(model, loss, x, lambda record: record.sq_norms, group=dist.group.WORLD)
    compare(found, formulas.weighted_sum(parameters(DIVISIBLE, 1), at), at, "weighted_sum")


@needs_gloo
def test_weighted_sums() -> None:
    run_ranks(3, check_weighted_sum, SIZES[3])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_formulas_for_slices_of_one_size(ranks: int) -> None:
    """Written as on paper: `R` ranks of `b` examples, `a` channels gathered, `c` split."""
    b, a, c = 5, 12, 24
    at, others, size = Place((b,) * ranks, 0), ranks - 1, a * c
    for outputs, inputs in ((c, a), (a, c)):
        short, long = (Parameter(outputs, inputs, positions) for positions in (1, 40))
        assert formulas.exchange(short, at) == Received(
            factors=Fraction(others * b * (a + c // ranks)), headers=1
        )
        assert formulas.exchange(long, at) == Received(
            sums=Fraction(others * b * size // ranks), headers=1
        )
        assert formulas.sq_norms([short], at).sums == others * size // ranks
        assert formulas.wrapper([short], at).sums == Fraction(2 * others * size, ranks)
