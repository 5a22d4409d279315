"""Norms of all layers whose gradients are products of rows, taken at once."""

import pytest
import torch

import pycoherence as pc
from pycoherence.capture import Factors
from pycoherence.robust._space import measure
from pycoherence.sites import AffineSite, ConvSite, LinearSite, Site, norm_rows
from pycoherence.statistics import Batch

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def sites(dtype: torch.dtype) -> list[Site]:
    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    window = ((3,), (1,), (1,), (1,))
    return [
        *(LinearSite(new(5, i), new(5, o)) for i, o in ((7, 3), (40, 1))),
        LinearSite(new(5, 2, 7), new(5, 2, 3)),
        *(AffineSite(new(5, t, 4)) for t in (1, 3)),
        AffineSite(new(5, 1, 4), new(5, 1, 4)),
        ConvSite(new(5, 2, 6), new(5, 3, 6), *window, 1),
    ]


def norms(found: list[Site]) -> torch.Tensor:
    factors = {str(i): Factors.of(site) for i, site in enumerate(found)}
    return measure(factors, Batch(5, 3), "sq_norms", None).sq_norms


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_are_those_of_the_sites(dtype: torch.dtype) -> None:
    found = sites(dtype)
    each = [site.reduce(("sq_norms",)).sq_norms for site in found]
    expected = 9 * sum(one.double() for one in each if one is not None)
    torch.testing.assert_close(norms(found), expected, rtol=1e-5, atol=0)
    mixed = norms([*found, *sites(torch.float32)])
    assert (mixed > norms(found)).all()


def test_which_sites_have_rows() -> None:
    assert [len(norm_rows(site)) for site in sites(torch.float32)] == [2, 2, 0, 1, 0, 0, 0]
    assert [len(norm_rows(site)) for site in sites(torch.float64)] == [0, 0, 0, 1, 0, 0, 0]


def test_factors_out_of_range_of_which_the_products_are_not() -> None:
    x, g = torch.full((5, 3), 1e25), torch.full((5, 2), 1e-25)
    expected = torch.full((5,), 9 * 6.0, dtype=torch.float64)
    torch.testing.assert_close(norms([LinearSite(x, g)] * 2), 2 * expected)


@pytest.mark.parametrize("name", [None, "reference"])
def test_the_backend_that_is_asked_for_runs(name: str | None) -> None:
    with pc.backend(name):
        assert norms(sites(torch.float32)).isfinite().all()
