"""Several rows as one example: each group's loss by itself through autograd."""

from typing import Any

import pytest
import torch
from catalogue.layers import LAYERS, B, randomise
from support.checks import assert_exact, assert_sums
from support.models import MODELS, classification, make, regression
from support.oracle import m_coherence, per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

ROWS = 6
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def six_rows(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, batch = make(name, torch.float64)
    return model, tuple(torch.cat([x, x[:1].flip(-1)]) for x in batch)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@reductions
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str, reduction: str) -> None:
    build, shape = LAYERS[name]
    model = randomise(build()).double()
    x = torch.randn(shape, dtype=torch.float64)
    assert_exact(model, regression(reduction), (x,), torch.float64, reduction, group_size=2)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert_exact(model, regression(reduction), (strided,), torch.float64, reduction, group_size=B)


@pytest.mark.parametrize("shape", [(ROWS, 5), (ROWS, 2, 3), (ROWS, 0)])
def test_embedding(shape: tuple[int, ...]) -> None:
    model = randomise(nn.Embedding(5, 7, padding_idx=2)).double()
    ids = torch.randint(5, shape)
    assert_exact(model, regression("mean"), (ids,), torch.float64, group_size=3)


@reductions
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, group_size: int, reduction: str) -> None:
    model, batch = six_rows(name)
    loss = classification(reduction)
    assert_exact(model, loss, batch, torch.float64, reduction, group_size)


@reductions
@pytest.mark.parametrize("name", MODELS)
def test_weighted_sums(name: str, reduction: Any) -> None:
    model, batch = six_rows(name)
    coef = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    gradients = per_example_gradients(model, classification(reduction), batch, 2)
    loss = classification(reduction)
    options: dict[str, Any] = {"loss_reduction": reduction, "group_size": 2}
    with pc.collect(model, keep_factors=True, **options) as record:
        loss(model, batch).backward()
    assert_sums(record.weighted_sum(coef), gradients, coef, 1e-10)
    assert_sums(pc.weighted_sum(model, loss, batch, coef, **options), gradients, coef, 1e-10)


@reductions
def test_meter(reduction: Any) -> None:
    """Its batches may have any number of groups."""
    model, batch = six_rows("cnn")
    meter = pc.CoherenceMeter(model, loss_reduction=reduction, group_size=2)
    for part in (slice(0, 4), slice(4, 6)):
        meter.update(classification(reduction), tuple(x[part] for x in batch))
    gradients = per_example_gradients(model, classification(reduction), batch, 2)
    assert meter.compute().n == 3
    assert meter.compute().m == pytest.approx(m_coherence(gradients))


def test_meters_of_other_groups_are_not_merged() -> None:
    model, batch = six_rows("mlp")
    one, two = (pc.CoherenceMeter(model, group_size=n) for n in (1, 2))
    for meter in (one, two):
        meter.update(classification("mean"), batch)
    for combine in (lambda: one.merge(two), lambda: one.load_state_dict(two.state_dict())):
        with pytest.raises(ValueError, match="with group_size=1, got one with group_size=2"):
            combine()
    two.load_state_dict(two.state_dict())
    assert two.n == 3


def test_what_is_not_finite_stays_in_its_group() -> None:
    model, (inputs, labels) = six_rows("mlp")
    inputs[2, 0] = float("nan")
    with pc.collect(model, pc.SqNorms(), keep_factors=True, group_size=2) as record:
        classification("mean")(model, (inputs, labels)).backward()
    assert record.sq_norms.isnan().tolist() == [False, True, False]
    coef = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert all(x.isfinite().all() for x in record.weighted_sum(coef).values())


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_has_no_groups(name: str) -> None:
    model, batch = make(name, torch.float64)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum", group_size=2) as record:
        classification("sum")(model, tuple(x[:0] for x in batch)).backward()
    assert record.batch_size == 0
    assert record.gram.shape == (0, 0)
    assert record.sq_norms.shape == (0,)


OTHERS = torch.ones(6, 3)  # made outside of the block


def test_rows_that_are_not_whole_groups_are_refused() -> None:
    model = nn.Linear(3, 2)
    message = (
        r"parameter 'weight'.*its input \(7, 3\) has 7 rows, which are not whole groups of "
        r"group_size=2.*give it a multiple of 2 rows"
    )
    with pc.collect(model, pc.SqNorms(), group_size=2) as record:
        with pytest.raises(pc.UnsupportedError, match=message):
            model(torch.ones(7, 3))
        model(torch.ones(8, 3)).sum().backward()
        assert record.batch_size == 4
        with pytest.raises(pc.UnsupportedError, match="has 6 rows, but the batch size of this"):
            model(OTHERS)


@pytest.mark.parametrize(
    ("group_size", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (None, TypeError), (True, TypeError)],
)
def test_group_sizes_are_whole_numbers(group_size: Any, error: type[Exception]) -> None:
    model = nn.Linear(3, 2)
    for make_it in (
        lambda: pc.collect(model, pc.SqNorms(), group_size=group_size),
        lambda: pc.aggregate(model, pc.Median(), group_size=group_size),
        lambda: pc.CoherenceMeter(model, group_size=group_size),
        lambda: pc.weighted_sum(model, None, None, torch.ones(1), group_size=group_size),
    ):
        with pytest.raises(error, match=r"expected group_size to be a whole number.*got "):
            make_it()


def test_batch_norm_still_mixes_the_groups() -> None:
    with (
        pytest.raises(pc.UnsupportedError, match="batch statistics mix the examples"),
        pc.collect(nn.BatchNorm1d(3), pc.SqNorms(), group_size=2),
    ):
        pass
