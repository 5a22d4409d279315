"""Gradients of a few regions of a parameter, against rows that are mostly zeros."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import assert_reduced_close
from support.made_sites import assert_reduces, conv, linear, randn, scale, shift, table
from support.materialised import reductions
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.family.rules import RULES
from pycoherence.sites import (
    AffineSite,
    LinearSite,
    Part,
    PartsSite,
    Site,
    joint,
    norm_rows,
    of_rows,
)
from pycoherence.sites._strided import Region, are_disjoint, holds_each_once

B = 5


Case = tuple[tuple[int, ...], list[tuple[Callable[..., Site], Callable[[Tensor], Tensor]]]]

CASES: dict[str, Case] = {
    "experts": ((3, 5, 7), [(linear, lambda w: w[0]), (linear, lambda w: w[2])]),
    "all-experts": ((2, 5, 7), [(linear, lambda w: w[0]), (linear, lambda w: w[1])]),
    "transposed": ((3, 5, 7), [(linear, lambda w: w[1].t()), (linear, lambda w: w[0])]),
    "rows": ((9, 4), [(linear, lambda w: w[:3]), (linear, lambda w: w[3:5])]),
    "columns": ((4, 9), [(linear, lambda w: w[:, :3]), (linear, lambda w: w[:, 4:])]),
    "interleaved": ((6, 5), [(linear, lambda w: w[::2]), (linear, lambda w: w[1::2])]),
    "chunks": ((3, 8, 5), [(linear, lambda w: w.chunk(2, 1)[1][2]), (shift, lambda w: w[0, 3])]),
    "one-row": ((3, 5), [(linear, lambda w: w[1:2]), (shift, lambda w: w[2])]),
    "one-column": ((3, 5), [(linear, lambda w: w[:, 1:2])]),
    "bias": ((9,), [(shift, lambda w: w[2:5]), (scale, lambda w: w[5:])]),
    "table": ((9, 3), [(table, lambda w: w[2:6]), (table, lambda w: w[6:])]),
    "conv": ((6, 2, 3, 2), [(conv, lambda w: w[:2]), (conv, lambda w: w[3:])]),
    "conv-channels": ((4, 5, 3), [(conv, lambda w: w[:, :2]), (conv, lambda w: w[:, 2:])]),
    "empty": ((4, 3), [(shift, lambda w: w[2:2]), (shift, lambda w: w[3:])]),
    "number": ((4,), [(shift, lambda w: w[2])]),
}


def part(make: Callable[..., Site], view: Callable[[Tensor], Tensor], leaf: Tensor, b: int) -> Part:
    seen = view(leaf)
    return Part(make(seen.shape, b), tuple(seen.shape), seen.stride(), seen.storage_offset())


def build(case: Case, b: int = B) -> tuple[PartsSite, Tensor]:
    """The site, and its gradients put where they belong by their indices."""
    shape, uses = case
    leaf = torch.zeros(shape)
    parts = tuple(part(make, view, leaf, b) for make, view in uses)
    rows = torch.zeros(b, leaf.numel(), dtype=torch.float64)
    places = torch.arange(leaf.numel()).view(shape)
    for (_, view), one in zip(uses, parts, strict=True):
        rows[:, view(places).flatten()] += one.site.rows().reshape(b, view(places).numel())
    return PartsSite(parts, shape), rows.view(b, *shape)


@pytest.mark.parametrize("b", [B, 1, 0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reductions(case: Case, b: int) -> None:
    site, rows = build(case, b)
    torch.testing.assert_close(site.rows(), rows)
    assert_reduces(site, rows)
    for name in Reduced._fields:
        direction = randn(*site.shape) if name == "dots" else None
        out = site.reduce((name,), direction=direction)
        assert [n for n, x in out._asdict().items() if x is not None] == [name]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_direction_with_any_strides(case: Case) -> None:
    site, rows = build(case)
    for direction in (
        randn(3, *site.shape)[1],
        randn(*site.shape, 2)[..., 1],
        randn(*site.shape[::-1]).permute(*range(len(site.shape))[::-1]),
    ):
        expected = reductions(rows, ("dots",), None, direction)
        assert_reduced_close(site.reduce(("dots",), direction=direction), expected, 1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_robust_aggregates(case: Case, rule: str) -> None:
    site, rows = build(case)
    for k, drop in itertools.product({RULES[rule].fewest, 1, RULES[rule].most(B)}, (False, True)):
        if not RULES[rule].fewest <= k <= RULES[rule].most(B):
            continue
        expected = of_rows(rows).order(rule, k, drop)
        torch.testing.assert_close(site.order(rule, k, drop), expected)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_makes_zero_of_zeros(rule: str) -> None:
    for k in {RULES[rule].fewest, RULES[rule].most(B)}:
        assert not of_rows(torch.zeros(B, 3)).order(rule, k, False).any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_empty_batch_has_an_aggregate_of_zeros(case: Case) -> None:
    site, _ = build(case, 0)
    assert torch.equal(site.order("median", 0, False), torch.zeros(site.shape, dtype=torch.float64))


@pytest.mark.parametrize("b", [6, 0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups(case: Case, b: int) -> None:
    site, rows = build(case, b)
    assert_reduces(site.grouped(3), rows.view(b // 3, 3, *site.shape).sum(1))
    some = torch.tensor([2, 0, 0])[:b]
    assert_reduces(site.picked(some), rows[some])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_slices(case: Case) -> None:
    site, rows = build(case)
    found = site.by_slices(lambda some: some[0] + 2 * some[-1])
    torch.testing.assert_close(found, rows[0] + 2 * rows[-1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tensors_can_be_changed(case: Case) -> None:
    site, rows = build(case)
    found = site.tensors()
    kinds = [set(one.site.tensors()) for one in site.parts]
    assert len(found) == sum(map(len, kinds))
    doubled = site.with_tensors({n: 2 * x for n, x in found.items() if n.endswith(".g")})
    torch.testing.assert_close(doubled.rows(), 2 * rows)
    assert {n: x is site.tensors()[n] for n, x in doubled.tensors().items()} == {
        n: not n.endswith(".g") for n in found
    }
    assert norm_rows(site) == ()


def use(
    shape: tuple[int, ...], make: Any, view: Callable[[Tensor], Tensor], b: int = B
) -> PartsSite:
    return build((shape, [(make, view)]), b)[0]


JOINT = {
    "disjoint": [(linear, lambda w: w[0]), (linear, lambda w: w[1]), (linear, lambda w: w[2])],
    "same": [(linear, lambda w: w[1]), (linear, lambda w: w[1]), (linear, lambda w: w[2])],
    "same-of-two-kinds": [(linear, lambda w: w[1]), (shift, lambda w: w[1])],
    "columns": [(shift, lambda w: w[..., :3]), (shift, lambda w: w[..., 3:])],
    "overlap": [(linear, lambda w: w[1]), (shift, lambda w: w[:2])],
    "blocks-overlap": [(linear, lambda w: w[0, 1:4]), (linear, lambda w: w[0, :, 2:5])],
    "with-whole": [(linear, lambda w: w[0]), (shift, lambda w: w)],
    "block-with-whole": [(linear, lambda w: w[0, 1:4, 2:]), (linear, lambda w: w.view(15, 7))],
}


@pytest.mark.parametrize("b", [B, 0])
@pytest.mark.parametrize("uses", JOINT.values(), ids=JOINT)
def test_several_uses(uses: Any, b: int) -> None:
    shape = (3, 5, 7)
    sites = [use(shape, *one, b) for one in uses]
    rows = torch.stack([site.rows() for site in sites]).sum(0)
    assert_reduces(joint(sites), rows)


def test_parts_stay_parts_unless_they_overlap() -> None:
    kinds = {}
    for name, uses in JOINT.items():
        kinds[name] = joint([use((3, 5, 7), *one) for one in uses])
    for name in ("disjoint", "same", "same-of-two-kinds", "columns"):
        assert isinstance(kinds[name], PartsSite), name
    assert isinstance(kinds["overlap"], AffineSite)
    same = kinds["same"]
    assert isinstance(same, PartsSite)
    assert [type(one.site) for one in same.parts] == [LinearSite, LinearSite]


def test_blocks_that_overlap_keep_factors() -> None:
    one = PartsSite((Part(linear((20, 30), B), (20, 30), (40, 1), 0),), (30, 40))
    two = PartsSite((Part(linear((20, 30), B), (20, 30), (40, 1), 210),), (30, 40))
    whole = linear((30, 40), B)
    for sites in ([one, two], [one, whole], [whole, two, one], [two, one, whole, whole]):
        found = joint(sites)
        assert isinstance(found, LinearSite)
        assert_reduces(found, torch.stack([site.rows() for site in sites]).sum(0))


def regions(seed: int) -> list[Region]:
    """Of a tensor of 60 elements, all kinds of views."""
    w = torch.zeros(3, 4, 5)
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    found = []
    for _ in range(40):
        view = w.view([(60,), (3, 4, 5), (12, 5), (5, 12), (2, 5, 6)][pick(5)])
        for dim in range(view.dim()):
            start = pick(view.shape[dim])
            stop = start + pick(view.shape[dim] - start + 1)
            view = view[(slice(None),) * dim + (slice(start, stop, 1 + pick(2)),)]
        found.append(Region.of(view.permute(*torch.randperm(view.dim(), generator=generator)), w))
    return found


def places(region: Region) -> list[int]:
    return torch.arange(60).as_strided(*region).flatten().tolist()


@pytest.mark.parametrize("seed", range(5))
def test_whether_regions_meet(seed: int) -> None:
    for one, two in itertools.combinations(regions(seed), 2):
        assert are_disjoint([one, two]) == (not set(places(one)) & set(places(two)))
        assert one.end - 1 == max(places(one), default=one.offset - 1)
    for three in itertools.combinations(regions(seed)[:12], 3):
        pairs = itertools.combinations(three, 2)
        assert are_disjoint(three) == all(are_disjoint(pair) for pair in pairs)


def test_dense_regions() -> None:
    for region in (r for seed in range(5) for r in regions(seed) if r.numel):
        start = region.offset
        assert region.is_dense == (places(region) == list(range(start, start + region.numel)))


@pytest.mark.parametrize(
    ("size", "stride"), [((3, 2), (1, 2)), ((3, 4), (1, 1)), ((2, 3), (3, 2)), ((4,), (0,))]
)
def test_whether_a_region_holds_a_number_twice(
    size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    found = places(Region(size, stride, 1))
    assert holds_each_once(Region(size, stride, 1)) == (len(set(found)) == len(found))
