"""Each kind of site gives parameter-shaped reductions of the gradients autograd would."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.made_sites import assert_reduces, randn
from support.materialised import gradients
from support.plain_rules import assert_aggregated
from support.settings import workspace
from torch import Tensor

from pycoherence.sites import (
    AffineSite,
    ConvSite,
    EmbeddingSite,
    FactoredSite,
    LinearSite,
    Site,
    joint,
    of_rows,
)

B = 4


# The site, and what its layer makes of the parameter and example b.
Case = tuple[Site, Callable[[Tensor, int], Tensor], tuple[int, ...], Tensor]


def linear(*positions: int) -> Case:
    x, g = randn(B, *positions, 4), randn(B, *positions, 5)
    return LinearSite(x, g), lambda w, b: F.linear(x[b : b + 1], w), (5, 4), g


def conv(n: int) -> Case:
    function = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    kernel, options = [2] * n, ([2] * n, [1] * n, [2] * n, 2)
    x, shape = randn(B, 4, *[6] * n), (6, 2, *kernel)
    g = torch.randn_like(function(x, randn(*shape), None, *options))
    site = ConvSite(x, g, kernel, *options)
    return site, lambda w, b: function(x[b : b + 1], w, None, *options), shape, g


def embedding(*positions: int) -> Case:
    ids, g = torch.randint(6, (B, *positions)), randn(B, *positions, 4)
    site = EmbeddingSite(ids, g, 6, padding_idx=2)
    return site, lambda w, b: F.embedding(ids[b : b + 1], w, padding_idx=2), (6, 4), g


def scale(*shape: int) -> Case:
    """LayerNorm over several dimensions."""
    x, g = randn(B, 5, *shape), randn(B, 5, *shape)
    dims = tuple(range(2, 2 + len(shape)))
    var, mean = torch.var_mean(x, dims, correction=0)
    rows = (B, 5, -1)
    site = AffineSite(
        g.reshape(rows),
        x.reshape(rows),
        mean.reshape(B, 5, 1),
        (var + 1e-5).rsqrt().reshape(B, 5, 1),
        shape,
    )
    return site, lambda w, b: F.layer_norm(x[b : b + 1], shape, w), shape, g


def shift(*shape: int) -> Case:
    g = randn(B, 5, *shape)
    site = AffineSite(g.reshape(B, 5, -1), shape=shape)
    return site, lambda w, b: w.expand(1, 5, *shape), shape, g


CASES: dict[str, Callable[[], Case]] = {
    "linear-2d": lambda: linear(),
    "linear-3d": lambda: linear(7),
    "linear-5d": lambda: linear(2, 3, 2),
    "conv-1d": lambda: conv(1),
    "conv-2d": lambda: conv(2),
    "conv-3d": lambda: conv(3),
    "embedding-2d": lambda: embedding(5),
    "embedding-3d": lambda: embedding(2, 5),
    "scale": lambda: scale(4),
    "scale-two-dims": lambda: scale(4, 3),
    "shift": lambda: shift(4),
    "shift-two-dims": lambda: shift(4, 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_reductions(case: Callable[[], Case]) -> None:
    site, forward, shape, g = case()
    rows = gradients(forward, shape, g)
    assert_reduces(site, rows)


@pytest.mark.parametrize("rule", [("trimmed_mean", 1, False), ("median_of_means", 2, True)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_robust_aggregates(case: Callable[[], Case], rule: tuple[str, float, bool]) -> None:
    site, forward, shape, g = case()
    rows = gradients(forward, shape, g)
    op = "affine" if isinstance(site, AffineSite) else type(site).__name__[:-4].lower()
    op = {"affine": "dense"}.get(op, op)
    assert_aggregated(f"{op}_order", lambda: site.order(*rule), rows, *rule, 1e-10)


@pytest.mark.parametrize("case", [scale, shift])
def test_rows_of_channels_are_made_in_parts(case: Callable[..., Case]) -> None:
    site, _, _, _ = case(4)
    whole = site.order("median", 0, False)
    with workspace(1):
        assert torch.equal(site.order("median", 0, False), whole)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("n", [1, 2, B])
def test_groups_have_the_sums_of_their_examples(case: Callable[[], Case], n: int) -> None:
    site, forward, shape, g = case()
    rows = gradients(forward, shape, g).unflatten(0, (-1, n)).sum(1)
    assert_reduces(site.grouped(n), rows)
    mean = site.grouped(n).order("trimmed_mean", 0, False)
    torch.testing.assert_close(mean, rows.mean(0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_some_examples_in_any_order(case: Callable[[], Case]) -> None:
    site, *_ = case()
    examples = torch.tensor([2, 0, 0])
    assert site.picked(examples).rows().equal(site.rows()[examples])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("room", [1, 500, 2**20])
def test_each_coordinate_is_in_one_slice(case: Callable[[], Case], room: int) -> None:
    site, *_ = case()
    rows = site.rows()
    with workspace(room):
        found = site.by_slices(lambda some: some[0] + 2 * some[-1])
    torch.testing.assert_close(found, rows[0] + 2 * rows[-1])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_not_wanted_is_none(case: Callable[[], Case]) -> None:
    site, _, shape, _ = case()
    out = site.reduce(("weighted_sum",))
    assert [name for name, x in out._asdict().items() if x is not None] == ["weighted_sum"]
    assert out.weighted_sum.shape == shape


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_parameter_of_another_shape(case: Callable[[], Case]) -> None:
    site, _, shape, _ = case()
    assert isinstance(site, FactoredSite)
    rows, flat = site.rows(), site.reshaped((1, math.prod(shape)))
    assert flat.reshaped(shape).parameter_shape == site.parameter_shape == shape
    assert_reduces(flat, rows.view(B, 1, -1))
    assert torch.equal(flat.order("median", 0, False), site.order("median", 0, False).view(1, -1))
    assert torch.equal(flat.rows(), rows.view(B, 1, -1))
    assert flat.grouped(2).rows().shape == (B // 2, 1, math.prod(shape))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tensors_can_be_changed(case: Callable[[], Case]) -> None:
    site, _, _, _ = case()
    assert list(site.tensors()) == [n for n, x in vars(site).items() if isinstance(x, Tensor)]
    doubled = site.with_tensors({"g": 2 * site.tensors()["g"]})
    torch.testing.assert_close(doubled.rows(), 2 * site.rows())


@pytest.mark.parametrize("shape", [(3, 2), (), (0, 4)])
def test_no_gradients_at_all(shape: tuple[int, ...]) -> None:
    site = of_rows(randn(0, *shape))
    assert site.rows().shape == (0, *shape)
    assert torch.equal(site.order("median", 0, False), torch.zeros(shape, dtype=torch.float64))
    assert joint([site, site]).rows().shape == (0, *shape)


@pytest.mark.parametrize("padding", [None, 2])
def test_rows_of_a_table(padding: int | None) -> None:
    ids, g = torch.randint(5, (3, 4)), randn(3, 4, 2)
    whole = EmbeddingSite(ids, g, 5, padding).rows()
    for start, length in ((0, 3), (3, 2), (1, 1), (2, 0), (0, 5)):
        part = EmbeddingSite(ids, g, 5, padding).narrowed(start, length).rows()
        torch.testing.assert_close(part, whole[:, start : start + length])
