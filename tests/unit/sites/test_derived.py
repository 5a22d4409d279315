"""Tensors that are made of a parameter: its gradients are those that autograd takes back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import assert_reduced_close
from support.made_sites import assert_reduces, conv, linear, randn, shift, table
from support.materialised import reductions
from torch import Tensor, nn

from pycoherence.sites import (
    AffineSite,
    ConvSite,
    EmbeddingSite,
    LinearSite,
    PartsSite,
    ShiftedSite,
    Site,
    joint,
    made_of,
    of_rows,
)

B = 3


def bare_shift(shape: tuple[int, ...], b: int) -> Site:
    return AffineSite(randn(b, 2, *shape))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def reversal(w: Tensor) -> Any:
    return Reversal.apply(w)


NUMBER = torch.tensor(-0.7, dtype=torch.float64)


def spectral(w: Tensor) -> Tensor:
    matrix = w.flatten(1)
    u, v = randn(len(matrix)), randn(matrix.shape[1])
    return w / torch.vdot(u, torch.mv(matrix, v))


# The parameter's shape, what is made of it, the site of that, and the site of the parameter.
Case = tuple[tuple[int, ...], Callable[[Tensor], Tensor], Callable[..., Site], type[Site]]

CASES: dict[str, Case] = {
    "itself": ((6, 4), lambda w: w, linear, LinearSite),
    "alias": ((6, 4), lambda w: w.view_as(w), linear, LinearSite),
    "other-matrix": ((6, 4), lambda w: w.view(4, 6), linear, LinearSite),
    "column": ((5, 1), lambda w: w.mT, linear, LinearSite),
    "row": ((1, 5), lambda w: w.mT, linear, LinearSite),
    "row-as-vector": ((1, 5), lambda w: w[0], shift, AffineSite),
    "vector-as-row": ((5,), lambda w: w[None], linear, LinearSite),
    "vector-as-column": ((5,), lambda w: w[:, None], linear, LinearSite),
    "transposed": ((6, 4), lambda w: w.t(), linear, LinearSite),
    "square-transposed": ((4, 4), lambda w: w.t(), linear, LinearSite),
    "merged": ((2, 3, 4), lambda w: w.view(6, 4), linear, LinearSite),
    "merged-transposed": ((2, 3, 4), lambda w: w.view(6, 4).t(), linear, LinearSite),
    "merged-otherwise": ((2, 3, 4), lambda w: w.view(2, 12), linear, LinearSite),
    "permuted": ((2, 3, 4), lambda w: w.permute(2, 0, 1), shift, PartsSite),
    "permuted-table": ((6, 4), lambda w: w.t(), table, PartsSite),
    "expert": ((3, 5, 4), lambda w: w[1], linear, PartsSite),
    "expert-transposed": ((3, 5, 4), lambda w: w[2].t(), linear, PartsSite),
    "unbound": ((3, 5, 4), lambda w: w.unbind(1)[2], linear, PartsSite),
    "chunk": ((3, 6, 4), lambda w: w.chunk(3, 1)[1][0], linear, PartsSite),
    "rows": ((6, 4), lambda w: w[2:5], linear, PartsSite),
    "columns": ((6, 4), lambda w: w[:, 1:3], linear, PartsSite),
    "columns-transposed": ((6, 4), lambda w: w[:, 1:3].t(), linear, PartsSite),
    "steps": ((6, 4), lambda w: w[::2, 1::2], linear, PartsSite),
    "only-expert": ((1, 5, 4), lambda w: w[0], linear, LinearSite),
    "bias": ((9,), lambda w: w.chunk(3)[1], shift, PartsSite),
    "bare-bias": ((9,), lambda w: w[2:4], bare_shift, PartsSite),
    "bias-as-it-is": ((9,), lambda w: w.view(3, 3), shift, AffineSite),
    "table": ((9, 4), lambda w: w[2:7], table, PartsSite),
    "table-as-it-is": ((3, 3, 4), lambda w: w.view(9, 4), table, EmbeddingSite),
    "conv": ((6, 2, 3), lambda w: w[1:4], conv, PartsSite),
    "conv-as-it-is": ((12, 3), lambda w: w.view(6, 2, 3), conv, ConvSite),
    "expanded": ((4,), lambda w: w.expand(5, 4), linear, AffineSite),
    "windows": ((9,), lambda w: w.unfold(0, 4, 2), linear, AffineSite),
    "squared": ((6, 4), lambda w: w.square(), linear, AffineSite),
    "doubled": ((6, 4), lambda w: torch.cat([w, w]), linear, AffineSite),
    "reversed": ((6, 4), reversal, linear, AffineSite),
    "reversed-part": ((6, 4), lambda w: reversal(w)[1:3], linear, AffineSite),
    "constant": ((6, 4), lambda w: w * 0.3, linear, LinearSite),
    "constant-first": ((6, 4), lambda w: 3 * w, linear, LinearSite),
    "divided": ((6, 4), lambda w: w / -3, shift, AffineSite),
    "constant-tensor": ((9, 4), lambda w: NUMBER * w, table, EmbeddingSite),
    "constant-conv": ((6, 2, 3), lambda w: w / NUMBER, conv, ConvSite),
    "twice": ((6, 4), lambda w: w * 0.5 * NUMBER, linear, AffineSite),
    "spectral": ((6, 4), spectral, linear, ShiftedSite),
    "spectral-conv": ((6, 2, 3), spectral, conv, ShiftedSite),
    "spectral-view": ((6, 4), lambda w: spectral(w.t()), linear, ShiftedSite),
    "spectral-part": ((3, 5, 4), lambda w: spectral(w[1]), linear, ShiftedSite),
    "spectral-twice": ((6, 4), lambda w: spectral(w.square()), linear, AffineSite),
    "normed": ((6, 4), lambda w: w / w.norm(), linear, ShiftedSite),
    "mean": ((6, 4), lambda w: w.mean() * w, linear, ShiftedSite),
    "mean-last": ((6, 4), lambda w: w * w.mean((0, 1), keepdim=True), linear, ShiftedSite),
    "number": ((1, 1), lambda w: w * w, linear, ShiftedSite),
    "number-spread": ((1,), lambda w: w * torch.ones(3, 4).double(), linear, AffineSite),
    "number-divided": ((1, 1), lambda w: w / (w + 3), linear, ShiftedSite),
}


def build(case: Case, b: int = B) -> tuple[Site, Tensor]:
    """The site of the parameter, and its gradients by autograd, one example at a time."""
    shape, view, make, _ = case
    leaf = nn.Parameter(randn(*shape))
    source = view(leaf)
    site = make(tuple(source.shape), b)
    rows = randn(b, *shape)
    for row, gradient in zip(rows, site.rows(), strict=True):
        (row[...],) = torch.autograd.grad(source, leaf, gradient, retain_graph=True)
    with torch.no_grad():
        (found,) = made_of(site, source, [leaf])
    return found, rows


@pytest.mark.parametrize("b", [B, 0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_reductions(case: Case, b: int) -> None:
    site, rows = build(case, b)
    assert_reduces(site, rows, 1e-9)
    torch.testing.assert_close(site.rows(), rows)
    aggregate = site.order("winsorized_mean", 1, False)
    torch.testing.assert_close(aggregate, of_rows(rows).order("winsorized_mean", 1, False))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kind_of_the_site(case: Case) -> None:
    assert type(build(case)[0]) is case[3]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_added_to_further_uses(case: Case) -> None:
    site, rows = build(case)
    whole = of_rows(randn(B, *case[0]))
    for others in ([site], [whole], [whole, site]):
        total = rows + torch.stack([other.rows() for other in others]).sum(0)
        found = joint([site, *others])
        actual = found.reduce(("sq_norms", "gram", "weighted_sum"))
        expected = reductions(total, ("sq_norms", "gram", "weighted_sum"), None, None)
        assert_reduced_close(actual, expected, 1e-9)


def test_uses_in_several_shapes() -> None:
    leaf = nn.Parameter(randn(12, 12))
    shapes = [(12, 12), (9, 16), (4, 36), (12, 12)]
    sites = [linear(shape, B) for shape in shapes]
    found = [
        made_of(site, leaf.view(shape), [leaf])[0]
        for site, shape in zip(sites, shapes, strict=True)
    ]
    total = torch.stack([site.rows().view(B, 12, 12) for site in sites]).sum(0)
    expected = reductions(total, ("gram", "weighted_sum"), None, None)
    assert_reduced_close(joint(found).reduce(("gram", "weighted_sum")), expected, 1e-10)


def test_an_expert_and_its_transpose_share_their_factors() -> None:
    leaf = nn.Parameter(randn(3, 5, 4))
    there = made_of(linear((5, 4), B), leaf[1], [leaf])[0]
    back = made_of(linear((4, 5), B), leaf[1].t(), [leaf])[0]
    found = joint([there, back])
    assert isinstance(found, PartsSite)
    assert len(found.parts) == 1
    assert isinstance(found.parts[0].site, LinearSite)
    torch.testing.assert_close(found.rows(), there.rows() + back.rows())


def test_parameters_in_one_storage_are_not_mistaken() -> None:
    flat = randn(30)
    first, second = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(3, 6))
    site = linear((3, 6), B)
    assert made_of(site, second, [second])[0] is site
    (found,) = made_of(linear((2, 6), B), second[1:], [second])
    assert isinstance(found, PartsSite)
    assert found.parts[0].offset == 6
    both = first.sum() * second
    assert [type(x) for x in made_of(site, both, [first, second])] == [AffineSite] * 2


def test_a_parameter_with_other_strides() -> None:
    leaf = nn.Parameter(randn(4, 6).t())
    site = linear((2, 4), B)
    (found,) = made_of(site, leaf[1:3], [leaf])
    torch.testing.assert_close(found.rows(), F.pad(site.rows(), (0, 0, 1, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_times_a_number_are_not_rounded(dtype: torch.dtype) -> None:
    leaf = nn.Parameter(torch.randn(5, 4, dtype=dtype))
    x, g = torch.randn(B, 2, 4, dtype=dtype), torch.randn(B, 2, 5, dtype=dtype)
    (found,) = made_of(LinearSite(x, g), leaf * 0.3, [leaf])
    expected = 0.3 * LinearSite(x.double(), g.double()).rows()
    torch.testing.assert_close(found.rows().double(), expected, rtol=1e-5, atol=1e-5)


def test_spectral_normalisation_of_torch() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6).double())
    leaf: Any = layer.parametrizations["weight"][0], layer.parametrizations["weight"].original
    source = layer.weight
    site = linear((6, 4), B)
    (found,) = made_of(site, source, [leaf[1]])
    assert isinstance(found, ShiftedSite)
    rows = [torch.autograd.grad(source, leaf[1], row, retain_graph=True)[0] for row in site.rows()]
    torch.testing.assert_close(found.rows(), torch.stack(rows))
