"""The coherence of a sample that comes in batches."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from support.meters import MEAN, Batch, assert_same, metered
from support.models import MODELS, classification, make
from support.oracle import m_coherence, per_example_gradients
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [[5], [1] * 5, [2, 3], [4, 1], [0, 5], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_equals_collect_however_the_sample_is_split(
    name: str, sizes: list[int], reduction: str
) -> None:
    model, batch = make(name, torch.float64)
    if 0 in sizes and reduction == "mean":
        pytest.skip("the mean loss of an empty batch is not a number")
    with pc.collect(model, pc.SqNorms(), loss_reduction=reduction) as record:
        classification(reduction)(model, batch).backward()
    meter = metered(model, batch, sizes, reduction)
    assert meter.n == 5
    assert_same(meter.compute(), record.coherence())


def test_an_empty_batch_adds_nothing_even_to_a_mean() -> None:
    """Its loss is NaN, but it has no gradient."""
    model, batch = make("mlp", torch.float64)
    assert_same(metered(model, batch, [3, 0, 2]).compute(), metered(model, batch, [5]).compute())


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_oracle_in_float32(name: str) -> None:
    model, batch = make(name)
    m = m_coherence(per_example_gradients(model, MEAN, batch))
    assert math.isclose(metered(model, batch, [2, 3]).compute().m, m, rel_tol=1e-5)


# Rows of "real": four of them share a feature; of "random": without it.
REAL = torch.zeros(4, 6)
for _i, _sign in enumerate([1.0, -1.0, -1.0, 1.0]):
    REAL[_i, _i] = REAL[_i, 5] = _sign
LABELS = torch.tensor([1.0, -1.0, -1.0, 1.0])


def square_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x).flatten() - y).square().mean()


@pytest.mark.parametrize(("features", "m"), [(6, 2.5), (5, 1.0)], ids=["real", "random"])
def test_toy_vectors_of_the_paper(features: int, m: float) -> None:
    """Linear regression from zero weights; 2.5 of 4 with a common feature, 1 without."""
    model = nn.Linear(features, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = (REAL[:, :features], LABELS)
    for sizes in ([4], [1, 3], [2, 2]):
        meter = pc.CoherenceMeter(model)
        for part in zip(*(x.split(sizes) for x in batch), strict=True):
            meter.update(square_loss, part)
        assert math.isclose(meter.compute().m, m, rel_tol=1e-6)
        assert math.isclose(meter.compute().alpha, m / 4, rel_tol=1e-6)


def test_copies_of_the_sample_leave_alpha_and_multiply_m() -> None:
    model, batch = make("mlp", torch.float64)
    once, twice = metered(model, batch, [5]), metered(model, batch, [5])
    twice.update(MEAN, batch)
    assert twice.n == 10
    assert math.isclose(twice.compute().alpha, once.compute().alpha)
    assert math.isclose(twice.compute().m, 2 * once.compute().m)


def test_computing_in_between_changes_nothing() -> None:
    model, batch = make("mlp", torch.float64)
    meter = pc.CoherenceMeter(model)
    for part in zip(*(x.split([2, 3]) for x in batch), strict=True):
        meter.update(MEAN, part)
        meter.compute()
    assert_same(meter.compute(), metered(model, batch, [5]).compute())


def test_the_model_and_its_gradients_are_left_alone() -> None:
    model, batch = make("mlp")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = Snapshot(model)
    metered(model, batch, [2, 3])
    before.assert_unchanged(model)


def test_works_under_no_grad() -> None:
    """As evaluation code usually runs."""
    model, batch = make("mlp", torch.float64)
    with torch.no_grad():
        meter = metered(model, batch, [5])
        assert not torch.is_grad_enabled()
    assert_same(meter.compute(), metered(model, batch, [5]).compute())


def test_unused_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["used"].bias.requires_grad_(False)
    meter = pc.CoherenceMeter(model)
    meter.update(lambda model, x: model["used"](x).mean(), torch.eye(2))
    parts = meter.compute().by_parameter
    assert {name: part.total_sq_norm for name, part in parts.items()} == {
        "used.weight": 2,
        "unused.weight": 0,
        "unused.bias": 0,
    }


def sgd(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def fused(model: nn.Module) -> None:
    torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()


def data(model: nn.Module) -> None:
    model[0].weight.data.add_(1)


def replaced(model: nn.Module) -> None:
    model[0].weight.data = torch.randn_like(model[0].weight)


def no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        model[4].bias[0] += 1


def loaded(model: nn.Module) -> None:
    model.load_state_dict(make("mlp")[0].double().requires_grad_(False).state_dict())


def unfrozen(model: nn.Module) -> None:
    model[2].requires_grad_(False)


@pytest.mark.parametrize(
    "change", [sgd, fused, data, replaced, no_grad, loaded, unfrozen], ids=lambda f: f.__name__
)
def test_changed_weights_are_refused_until_reset(change: Callable[[nn.Module], None]) -> None:
    model, batch = make("mlp", torch.float64)
    MEAN(model, batch).backward()
    meter = metered(model, batch, [5])
    before = meter.compute()
    change(model)
    with pytest.raises(RuntimeError, match=r"weights have changed.*reset\(\)"):
        meter.update(MEAN, batch)
    assert_same(meter.compute(), before)
    meter.reset()
    assert meter.n == 0
    meter.update(MEAN, batch)
    assert_same(meter.compute(), metered(model, batch, [5]).compute())


def test_parameters_unfrozen_later_are_measured_or_refused() -> None:
    model, batch = make("mlp")
    model[0].requires_grad_(False)
    meter = pc.CoherenceMeter(model)
    model[0].requires_grad_(True)
    meter.reset()
    meter.update(MEAN, batch)
    assert set(meter.compute().by_parameter) == {n for n, _ in model.named_parameters()}


def test_unfreezing_before_the_first_batch_is_noticed() -> None:
    model, batch = make("mlp")
    model[0].requires_grad_(False)
    meter = pc.CoherenceMeter(model)
    model[0].requires_grad_(True)
    try:
        meter.update(MEAN, batch)
    except RuntimeError:
        return
    assert set(meter.compute().by_parameter) == {n for n, _ in model.named_parameters()}


def test_reset_forgets_everything() -> None:
    model, batch = make("mlp")
    meter = metered(model, batch, [5])
    meter.reset()
    assert meter.n == 0
    with pytest.raises(RuntimeError, match=r"no example; call update\(loss_fn, batch\) first"):
        meter.compute()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: model(batch[0]),
        lambda model, batch: model(batch[0]).square().sum(1),
        lambda model, batch: 3.0,
        lambda model, batch: None,
    ],
    ids=["logits", "vector", "float", "none"],
)
def test_losses_that_are_not_scalars_are_refused(loss_fn) -> None:
    model, batch = make("mlp")
    meter = metered(model, batch, [5])
    before = meter.compute()
    with pytest.raises(ValueError, match="loss_fn to return a scalar tensor, got"):
        meter.update(loss_fn, batch)
    assert meter.compute() == before


def test_a_loss_of_another_model_is_refused() -> None:
    model, batch = make("mlp")
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="use the parameters of the model, got no use"):
        pc.CoherenceMeter(model).update(lambda _, batch: MEAN(other, batch), batch)


def test_a_refused_batch_changes_nothing() -> None:
    model, batch = make("mlp")
    meter = metered(model, batch, [5])
    before = meter.compute()
    with pytest.raises(pc.UnsupportedError):
        meter.update(lambda m, b: MEAN(m, b) + m[0].weight.sum(), batch)
    outside = MEAN(model, batch)
    with pytest.raises(pc.UnsupportedError):
        meter.update(lambda m, b: MEAN(m, b) + outside, batch)
    assert meter.compute() == before
    meter.update(MEAN, batch)
    assert meter.n == 10


def test_what_is_not_finite_shows() -> None:
    model, (inputs, labels) = make("mlp")
    meter = pc.CoherenceMeter(model)
    meter.update(MEAN, (inputs, labels))
    inputs[1] = float("nan")
    meter.update(MEAN, (inputs, labels))
    assert math.isnan(meter.compute().m)


def test_many_small_batches_lose_no_precision() -> None:
    """Sums are kept in float64: a float32 one would stop growing or drift."""
    model = nn.Linear(1, 1, bias=False)
    meter = pc.CoherenceMeter(model, loss_reduction="sum")
    x = torch.full((50, 1), 0.1)
    for _ in range(200):
        meter.update(lambda model, x: model(x).sum(), x)
    expected = 10_000 * (x[0, 0].double() ** 2).item()
    assert math.isclose(meter.compute().total_sq_norm, expected, rel_tol=1e-6)
    assert math.isclose(meter.compute().alpha, 1, rel_tol=1e-5)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="without any"):
        pc.CoherenceMeter(nn.ReLU())
