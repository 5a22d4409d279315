"""The weights of rules over whole examples, on points that hypothesis draws: ties, zeros, twins."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plain_rules as plain
from torch import Tensor

import pycoherence as pc
from pycoherence.robust._space import GramSpace


@st.composite
def points(draw: st.DrawFn, least: int = 1) -> Tensor:
    """Whole numbers, so that dot products are exact, few enough for many ties."""
    n, p = draw(st.integers(least, 24)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    top = draw(st.sampled_from([0, 1, 3, 1000]))
    return torch.randint(-top, top + 1, (n, p), generator=generator).double()


def space(rows: Tensor) -> GramSpace:
    return GramSpace(rows @ rows.T, len(rows))


@given(points(3), st.data())
def test_krum(rows: Tensor, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (len(rows) - 3) // 2))
    m = data.draw(st.integers(1, len(rows)))
    weights = pc.Krum(f, m).choose(space(rows)).weights
    torch.testing.assert_close(weights @ rows, plain.krum(rows, f, m))


@st.composite
def few_points(draw: st.DrawFn) -> tuple[Tensor, int]:
    """So few that all sets of them can be compared, and how many are left out."""
    rows = draw(points().filter(lambda rows: len(rows) <= 10))
    return rows, draw(st.integers(0, (len(rows) - 1) // 2))


@given(few_points())
def test_mda(drawn: tuple[Tensor, int]) -> None:
    rows, f = drawn
    weights = pc.MDA(f).choose(space(rows)).weights
    torch.testing.assert_close(weights @ rows, plain.mda(rows, f))


@given(few_points())
def test_smea(drawn: tuple[Tensor, int]) -> None:
    """Among sets that are equal but for rounding any may be taken."""
    rows, f = drawn
    chosen = pc.SMEA(f).choose(space(rows)).chosen

    def spread(some: Tensor) -> float:
        return torch.linalg.svdvals(some - some.mean(0)).max().item() ** 2

    best = plain.smea_set(rows, f)
    assert spread(rows[chosen]) <= spread(rows[best]) * (1 + 1e-9) + 1e-9


@given(points(), st.data())
def test_monna(rows: Tensor, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (len(rows) - 1) // 2))
    trusted = data.draw(st.integers(0, len(rows) - 1))
    weights = pc.MoNNA(f, trusted).choose(space(rows)).weights
    torch.testing.assert_close(weights @ rows, plain.monna(rows, f, trusted))


@pytest.mark.parametrize(("n", "f"), [(64, 31), (100, 20)])
def test_the_least_diameter_of_many(n: int, f: int) -> None:
    """It is feasible, and a little less is not: a bound by pairs that are too far apart."""
    rows = torch.randn(n, 3, dtype=torch.float64)
    chosen = pc.MDA(f).choose(space(rows)).chosen
    assert len(set(chosen.tolist())) == n - f
    distances = torch.cdist(rows, rows)
    diameter = distances[chosen][:, chosen].max()
    # Greedy sets around each point are never better.
    around = distances.sort(dim=1).indices[:, : n - f]
    assert all(diameter <= distances[some][:, some].max() + 1e-9 for some in around)


@given(points(3), st.data())
def test_bulyan(rows: Tensor, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (len(rows) - 3) // 4))
    chosen = pc.Bulyan(f).choose(space(rows)).chosen
    assert len(set(chosen.tolist())) == len(chosen) == len(rows) - 2 * f
    picked = rows[chosen]
    ours = plain.coordinates("meamed", 2 * f)(picked)
    torch.testing.assert_close(ours, plain.bulyan(rows, f))


@given(points(), st.integers(1, 5))
def test_geometric_median(rows: Tensor, iterations: int) -> None:
    rule = pc.GeometricMedian(iterations, nu=0.1, tolerance=0)
    z = rule.choose(space(rows)).weights @ rows
    expected = plain.geometric_median(rows, iterations, 0.1, 0)
    scale = 1 + rows.norm(dim=1).max()
    assert (z - expected).norm() <= 1e-6 * scale


@given(points(2), st.sampled_from([0.5, 2.0, 700.0]), st.integers(1, 4))
def test_centered_clip(rows: Tensor, radius: float, iterations: int) -> None:
    """The last point is the centre."""
    n = len(rows) - 1
    choice = pc.CenteredClip(radius, iterations).choose(GramSpace(rows @ rows.T, n))
    ours = choice.weights @ rows[:n] + choice.carried * rows[n]
    expected = plain.centered_clip(rows[:n], rows[n], radius, iterations)
    assert (ours - expected).norm() <= 1e-6 * (1 + rows.norm(dim=1).max())


@given(points(), st.sampled_from([0.5, 2.0, 700.0]))
def test_norm_clip(rows: Tensor, limit: float) -> None:
    norms = GramSpace(rows.square().sum(1), len(rows))
    weights = pc.NormClip(limit).choose(norms).weights
    torch.testing.assert_close(weights @ rows, plain.norm_clip(rows, limit))


@given(points(), st.sampled_from([0.123, 0.777, 0.97, 1.1, 1.83]))
def test_gaf(rows: Tensor, threshold: float) -> None:
    weights = pc.GAF(threshold).choose(space(rows)).weights
    torch.testing.assert_close(weights @ rows, plain.gaf(rows, threshold))


@pytest.mark.parametrize("rule", [pc.Krum(5, 3), pc.GeometricMedian(3), pc.GAF(0.9)], ids=str)
def test_many_examples(rule: pc.Krum | pc.GeometricMedian | pc.GAF) -> None:
    rows = torch.randn(1030, 7, dtype=torch.float64)
    found = rule.choose(space(rows)).weights @ rows
    if isinstance(rule, pc.Krum):
        scores = torch.cdist(rows, rows).square().sort(1).values[:, 1 : 1 + 1030 - 5 - 2].sum(1)
        expected = rows[scores.argsort()[:3]].mean(0)
    elif isinstance(rule, pc.GAF):
        expected = plain.gaf(rows, 0.9)
    else:
        expected = plain.geometric_median(rows, 3, 1e-6, 1e-6)
    torch.testing.assert_close(found, expected)
