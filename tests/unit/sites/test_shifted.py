"""Gradients that are moved along one direction, against rows."""

from collections.abc import Callable

import pytest
import torch
from support.backends import assert_reduced_close
from support.made_sites import assert_reduces, randn
from support.materialised import reductions
from support.settings import threads
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites import AffineSite, LinearSite, Part, PartsSite, ShiftedSite, Site, of_rows

B = 6


INNER: dict[str, Callable[[int], Site]] = {
    "linear": lambda b: LinearSite(randn(b, 3, 7), randn(b, 3, 5)),
    "shift": lambda b: AffineSite(randn(b, 2, 35), shape=(5, 7)),
    "part": lambda b: PartsSite(
        (Part(LinearSite(randn(b, 7), randn(b, 2)), (2, 7), (7, 1), 14),), (5, 7)
    ),
}


def build(make: Callable[[int], Site], b: int = B) -> tuple[ShiftedSite, Tensor]:
    inner, coef, direction = make(b), randn(b), randn(5, 7)
    scale = torch.tensor(-0.4, dtype=torch.float64)
    site = ShiftedSite(inner, scale, coef, direction)
    return site, scale * inner.rows() + coef[:, None, None] * direction


def assert_each_reduces(site: Site, rows: Tensor) -> None:
    """Alone too, and along a direction with any strides."""
    assert_reduces(site, rows, 1e-9)
    coef, direction = randn(len(rows)), randn(7, 5).mT
    coef[:1] = 0
    for name in Reduced._fields:
        for c in [None, coef] if name in ("weighted_sum", "sum_dots") else [None]:
            along = direction if name == "dots" else None
            alone = site.reduce((name,), coef=c, direction=along)
            assert_reduced_close(alone, reductions(rows, (name,), c, along), 1e-9)


@pytest.mark.parametrize("b", [B, 1, 0])
@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_reductions(make: Callable[[int], Site], b: int) -> None:
    site, rows = build(make, b)
    torch.testing.assert_close(site.rows(), rows)
    assert_each_reduces(site, rows)


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_groups(make: Callable[[int], Site]) -> None:
    site, rows = build(make)
    assert_each_reduces(site.grouped(2), rows.unflatten(0, (3, 2)).sum(1))
    assert_each_reduces(site.picked(torch.tensor([4, 1, 1])), rows[[4, 1, 1]])


@pytest.mark.parametrize("rule", [("winsorized_mean", 1), ("sign_agreement", 0.5), ("median", 0)])
def test_robust_aggregates(rule: tuple[str, float]) -> None:
    site, rows = build(INNER["linear"])
    torch.testing.assert_close(site.order(*rule, False), of_rows(rows).order(*rule, False))


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_slices(make: Callable[[int], Site]) -> None:
    site, rows = build(make)
    found = site.by_slices(lambda some: some[0] + 2 * some[-1])
    torch.testing.assert_close(found, rows[0] + 2 * rows[-1])


def test_tensors_can_be_changed() -> None:
    site, rows = build(INNER["part"])
    assert set(site.tensors()) == {"scale", "coef", "direction", "site.0.x", "site.0.g"}
    found = site.with_tensors({name: 2 * site.tensors()[name] for name in ("coef", "site.0.g")})
    torch.testing.assert_close(found.rows(), 2 * rows)
    assert found.direction is site.direction


def test_an_example_without_weight_is_left_out() -> None:
    site, rows = build(INNER["linear"])
    site.coef[2] = torch.nan
    coef = torch.ones(B, dtype=torch.float64)
    coef[2] = 0
    total = site.reduce(("weighted_sum",), coef=coef).weighted_sum
    torch.testing.assert_close(total, rows.sum(0) - rows[2])
    norms = site.reduce(("sq_norms",)).sq_norms
    assert norms is not None
    assert norms.isnan().tolist() == [b == 2 for b in range(B)]


def test_results_of_floats_are_floats() -> None:
    site, rows = build(INNER["linear"])
    short = site.with_tensors({name: x.float() for name, x in site.tensors().items()})
    coef, direction = torch.randn(B), torch.randn(5, 7)
    out = short.reduce(Reduced._fields, coef=coef, direction=direction)
    assert {x.dtype for x in out if x is not None} == {torch.float32}
    assert_reduced_close(out, reductions(rows, Reduced._fields, coef, direction), 1e-5)
    assert short.order("median", 0, False).dtype == torch.float32


def test_the_number_of_threads_changes_nothing() -> None:
    inner = LinearSite(torch.randn(4, 300), torch.randn(4, 500))
    site = ShiftedSite(inner, torch.tensor(0.3), torch.randn(4), torch.randn(500, 300))
    found = []
    for n in (1, 2, 3):
        with threads(n):
            found.append(site.reduce(("sq_norms", "gram", "sum_dots", "weighted_sum")))
    for out in found[1:]:
        for ours, theirs in zip(out, found[0], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
