"""Meters that are merged, saved and loaded."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from support.meters import MEAN, assert_same, metered
from support.models import make
from torch import nn

import pycoherence as pc


def test_merge_adds_the_examples_of_another() -> None:
    model, batch = make("cnn", torch.float64)
    first, second = tuple(x[:2] for x in batch), tuple(x[2:] for x in batch)
    one, other = metered(model, first, [2]), metered(model, second, [1, 2])
    before = other.compute()
    one.merge(other)
    assert_same(one.compute(), metered(model, batch, [5]).compute())
    assert_same(other.compute(), before)
    one.update(MEAN, first)
    assert one.n == 7
    assert_same(other.compute(), before)


def test_merge_with_a_copy_of_the_model_and_with_itself() -> None:
    model, batch = make("mlp", torch.float64)
    meter = metered(model, batch, [5])
    meter.merge(metered(copy.deepcopy(model), batch, [2, 3]))
    assert meter.n == 10
    alpha = meter.compute().alpha
    meter.merge(meter)
    assert meter.n == 20
    assert math.isclose(meter.compute().alpha, alpha)


def test_merge_with_an_empty_meter_changes_nothing() -> None:
    model, batch = make("mlp", torch.float64)
    meter = metered(model, batch, [5])
    before = meter.compute()
    meter.merge(pc.CoherenceMeter(model))
    assert_same(meter.compute(), before)
    empty = pc.CoherenceMeter(model)
    empty.merge(meter)
    assert_same(empty.compute(), before)


def test_merge_of_mean_and_sum_meters_is_the_same_sample() -> None:
    model, batch = make("mlp", torch.float64)
    first, second = tuple(x[:2] for x in batch), tuple(x[2:] for x in batch)
    meter = metered(model, first, [2], "mean")
    meter.merge(metered(model, second, [3], "sum"))
    assert_same(meter.compute(), metered(model, batch, [5]).compute())


def test_state_survives_a_round_trip_through_a_file() -> None:
    model, batch = make("mlp", torch.float64)
    meter = metered(model, batch, [2, 3])
    file = io.BytesIO()
    torch.save(meter.state_dict(), file)
    file.seek(0)
    loaded = pc.CoherenceMeter(copy.deepcopy(model))
    loaded.update(MEAN, batch)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.n == 5
    assert loaded.compute() == meter.compute()


def test_state_dict_is_a_snapshot() -> None:
    model, batch = make("mlp", torch.float64)
    meter = metered(model, batch, [5])
    state, before = meter.state_dict(), meter.compute()
    meter.update(MEAN, batch)
    restored = pc.CoherenceMeter(model)
    restored.load_state_dict(state)
    assert_same(restored.compute(), before)
    restored.update(MEAN, batch)
    meter.load_state_dict(state)
    assert_same(meter.compute(), before)


def other_shape() -> nn.Module:
    return nn.Sequential(nn.Linear(11, 12), nn.ReLU(), nn.Linear(12, 7))


@pytest.mark.parametrize("other", [other_shape, lambda: make("cnn")[0]], ids=["shape", "names"])
def test_states_of_other_models_are_refused(other: Callable[[], nn.Module]) -> None:
    model, batch = make("mlp")
    meter = metered(model, batch, [5])
    before = meter.compute()
    for combine in (
        lambda: meter.merge(pc.CoherenceMeter(other())),
        lambda: meter.load_state_dict(pc.CoherenceMeter(other()).state_dict()),
    ):
        with pytest.raises(
            ValueError, match=r"same parameters, got another.*differ in .*0\.weight"
        ):
            combine()
    assert meter.compute() == before


def test_merge_refuses_other_weights() -> None:
    """Two points have no common coherence."""
    model, batch = make("mlp")
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight.add_(1)
    meter = metered(model, batch, [5])
    with pytest.raises((ValueError, RuntimeError), match="weights"):
        meter.merge(metered(moved, batch, [5]))
