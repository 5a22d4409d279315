"""`Record.weighted_sum` and `pc.weighted_sum` against one example at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.alive import live, live_tensors
from support.models import MODELS, Batch, classification, make
from support.oracle import joined, per_example_gradients
from support.snapshots import Snapshot
from support.steps import assert_gradients
from torch import Tensor, nn

import pycoherence as pc

COEF = torch.tensor([0.5, 0.0, -2.0, 1.0, 3.0], dtype=torch.float64)


def kept(model: nn.Module, batch: Batch, reduction: Any = "mean", *statistics: Any) -> pc.Record:
    with pc.collect(model, *statistics, loss_reduction=reduction, keep_factors=True) as record:
        classification(reduction)(model, batch).backward()
    return record


def weighted(gradients: dict[str, Tensor], coef: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(coef.double(), g, 1) for name, g in gradients.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_a_record_sums_without_a_second_backward_pass(name: str, reduction: str) -> None:
    model, batch = make(name, torch.float64)
    expected = weighted(per_example_gradients(model, classification(reduction), batch), COEF)
    assert_gradients(kept(model, batch, reduction).weighted_sum(COEF), expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_clips(name: str, reduction: Any) -> None:
    model, batch = make(name, torch.float64)
    gradients = per_example_gradients(model, classification(reduction), batch)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    limit = norms.median()
    before = Snapshot(model)
    actual = pc.weighted_sum(
        model,
        classification(reduction),
        batch,
        lambda record: (limit / record.sq_norms.sqrt()).clamp(max=1),
        loss_reduction=reduction,
    )
    before.assert_unchanged(model)
    assert_gradients(actual, weighted(gradients, (limit / norms).clamp(max=1)), 1e-10)


def test_the_function_takes_weights_and_leaves_gradients_alone() -> None:
    model, batch = make("cnn", torch.float64)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = Snapshot(model)
    actual = pc.weighted_sum(model, classification("mean"), batch, COEF)
    before.assert_unchanged(model)
    gradients = per_example_gradients(model, classification("mean"), batch)
    assert_gradients(actual, weighted(gradients, COEF), 1e-12)


def test_the_function_gives_any_statistic_to_the_weights() -> None:
    model, batch = make("mlp", torch.float64)
    actual = pc.weighted_sum(
        model,
        classification("mean"),
        batch,
        lambda record: (record.dots > 0).to(record.gram) / record.gram.diagonal(),
        pc.Gram(),
        pc.Dots("mean"),
    )
    gradients = per_example_gradients(model, classification("mean"), batch)
    rows = joined(gradients)
    coef = (rows @ rows.mean(0) > 0) / rows.square().sum(1)
    assert_gradients(actual, weighted(gradients, coef), 1e-12)


def test_a_weight_of_zero_hides_what_is_not_finite() -> None:
    model, (inputs, labels) = make("mlp", torch.float64)
    inputs[1, 0] = float("nan")
    others = [0, 2, 3, 4]
    found = kept(model, (inputs, labels)).weighted_sum(COEF)
    gradients = per_example_gradients(
        model, classification("mean"), (inputs[others], labels[others])
    )
    assert_gradients(found, weighted(gradients, COEF[others]), 1e-12)
    found = kept(model, (inputs, labels)).weighted_sum(torch.ones(5, dtype=torch.float64))
    assert found["0.weight"].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_of_any_floating_dtype(dtype: torch.dtype) -> None:
    model, batch = make("mlp")
    expected = weighted(per_example_gradients(model, classification("mean"), batch), COEF)
    found = kept(model, batch).weighted_sum(COEF.to(dtype))
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_gradients(found, expected, 1e-5)


def test_with_statistics_and_a_batch_of_one() -> None:
    model, (inputs, labels) = make("cnn", torch.float64)
    record = kept(model, (inputs[:1], labels[:1]), "mean", pc.SqNorms(), pc.Gram())
    assert record.gram.shape == (1, 1)
    found = record.weighted_sum(torch.ones(1, dtype=torch.float64))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_a_batch_of_none_sums_to_zero() -> None:
    model, (inputs, labels) = make("mlp")
    record = kept(model, (inputs[:0], labels[:0]), "sum")
    assert all(x.count_nonzero() == 0 for x in record.weighted_sum(torch.ones(0)).values())


def test_parameters_that_took_no_part_have_zeros() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    with pc.collect(model, keep_factors=True) as record:
        model["a"](torch.ones(4, 3)).sum().backward()
    found = record.weighted_sum(torch.ones(4))
    assert torch.equal(found["b.weight"], torch.zeros(2, 3))
    assert torch.equal(found["a.weight"], torch.full((2, 3), 16.0))


def test_factors_are_used_once_and_then_freed() -> None:
    model, batch = make("mlp")
    record = kept(model, batch, "mean", pc.SqNorms())
    before = live_tensors()
    record.weighted_sum(torch.ones(5))
    assert live() < before
    with pytest.raises(RuntimeError, match="used and freed by a call before"):
        record.weighted_sum(torch.ones(5))
    assert record.sq_norms.shape == (5,)


def change_input(batch: Batch) -> None:
    batch[0].zero_()


def change_a_view(batch: Batch) -> None:
    batch[0].view(-1)[3] = 1


@pytest.mark.parametrize("change", [change_input, change_a_view])
def test_factors_changed_in_place_are_noticed(change: Callable[[Batch], None]) -> None:
    model, batch = make("mlp")
    record = kept(model, batch)
    change(batch)
    with pytest.raises(RuntimeError, match=r"changed in place.*0\.weight are lost"):
        record.weighted_sum(torch.ones(5))


def test_training_on_does_not_touch_the_factors() -> None:
    model, batch = make("cnn", torch.float64)
    gradients = per_example_gradients(model, classification("mean"), batch)
    record = kept(model, batch)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad(set_to_none=False)
    classification("mean")(model, batch).backward()
    assert_gradients(record.weighted_sum(COEF), weighted(gradients, COEF), 1e-12)


def test_other_gradients_in_the_block_do_not_replace_the_factors() -> None:
    model, batch = make("mlp", torch.float64)
    gradients = per_example_gradients(model, classification("mean"), batch)
    with pc.collect(model, keep_factors=True) as record:
        inputs = batch[0].clone().requires_grad_()
        out = model(inputs)
        torch.nn.functional.cross_entropy(out, batch[1]).backward(retain_graph=True)
        torch.autograd.grad(out.sum(), inputs)
    assert_gradients(record.weighted_sum(COEF), weighted(gradients, COEF), 1e-12)


@pytest.mark.parametrize(
    ("coef", "error", "message"),
    [
        (torch.ones(4), ValueError, r"each of 5 examples, got shape \(4,\)"),
        (torch.ones(5, 1), ValueError, r"got shape \(5, 1\)"),
        (torch.ones(5).long(), TypeError, "floating tensor of coefficients on cpu, got torch.int"),
        (torch.ones(5, device="meta"), TypeError, "got torch.float32 on meta"),
        ([1.0] * 5, TypeError, r"got \[1.0"),
    ],
)
def test_weights_that_do_not_fit(coef: Any, error: type[Exception], message: str) -> None:
    model, batch = make("mlp")
    record = kept(model, batch)
    with pytest.raises(error, match=message):
        record.weighted_sum(coef)
    assert record.weighted_sum(torch.ones(5)).keys() == dict(model.named_parameters()).keys()


def test_factors_must_have_been_kept() -> None:
    model, batch = make("mlp")
    with pc.collect(model, pc.SqNorms()) as record:
        classification("mean")(model, batch).backward()
    with pytest.raises(RuntimeError, match=r"were not kept; use pc\.collect\(.*keep_factors=True"):
        record.weighted_sum(torch.ones(5))


def test_a_backward_pass_must_have_run() -> None:
    model, batch = make("mlp")
    with pc.collect(model, keep_factors=True) as record:
        with pytest.raises(RuntimeError, match="no parameter of the model was used"):
            record.weighted_sum(torch.ones(5))
        classification("mean")(model, batch)
    with pytest.raises(RuntimeError, match="no backward pass has run on this batch of 5"):
        record.weighted_sum(torch.ones(5))


def test_the_function_measures_no_coherence() -> None:
    model, batch = make("mlp")

    def coef(record: pc.Record) -> Tensor:
        with pytest.raises(AttributeError, match=r"not measure the coherence; use pc\.collect"):
            record.coherence()
        return record.sq_norms

    pc.weighted_sum(model, classification("mean"), batch, coef)


def test_the_function_checks_its_loss() -> None:
    model, batch = make("mlp")
    with pytest.raises(ValueError, match="expected loss_fn to return a scalar tensor"):
        pc.weighted_sum(model, lambda model, batch: model(batch[0]), batch, COEF)
    with pytest.raises(ValueError, match="to use the parameters of the model"):
        pc.weighted_sum(model, lambda model, batch: torch.ones(()), batch, COEF)
    with pytest.raises(ValueError, match="loss_reduction"):
        pc.weighted_sum(model, classification("mean"), batch, COEF, loss_reduction="none")
