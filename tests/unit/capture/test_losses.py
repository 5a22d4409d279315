"""What an example's gradient is under losses as people write them: B times its share of `.grad`."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_grads_equal, assert_norms, assert_sums, relative_error
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

B, T, V = 4, 3, 5
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, V)).double()


IDS = torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 3], [1, 0, 2]])
LABELS = torch.tensor([[2, -100, 1], [0, 4, 3], [-100, -100, 1], [2, 2, -100]])
KEPT = (LABELS != -100).sum(1)
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0]).double()


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """`[B, T]`, zero where the label is ignored."""
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none")


def own_sum(model: nn.Module, batch: Batch) -> Tensor:
    return token_losses(model, batch).sum()


def own_mean(model: nn.Module, batch: Batch) -> Tensor:
    return (token_losses(model, batch).sum(1) / (batch[1] != -100).sum(1)).mean()


# The loss, how it joins the examples, the loss of one, and what its gradient is multiplied by.
LOSSES: dict[str, tuple[Loss, str, Loss, Tensor]] = {
    "mean": (own_mean, "mean", own_mean, torch.ones(B)),
    "sum": (own_sum, "sum", own_sum, torch.ones(B)),
    "token-mean": (
        lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()),
        *("mean", own_mean, B * KEPT / KEPT.sum()),
    ),
    "token-mean-without-flattening": (
        lambda m, b: F.cross_entropy(m(b[0]).mT, b[1]),
        *("mean", own_sum, torch.full((B,), B / KEPT.sum())),
    ),
    "token-mean-asked-for-as-a-sum": (
        lambda m, b: F.cross_entropy(m(b[0]).mT, b[1]),
        *("sum", own_sum, torch.ones(B) / KEPT.sum()),
    ),
    "weights": (
        lambda m, b: (WEIGHTS * token_losses(m, b).sum(1)).mean(),
        *("mean", own_sum, WEIGHTS),
    ),
    "weights-that-are-divided-out": (
        lambda m, b: (WEIGHTS * token_losses(m, b).sum(1)).sum() / WEIGHTS.sum(),
        *("mean", own_sum, B * WEIGHTS / WEIGHTS.sum()),
    ),
    "several-added": (
        lambda m, b: own_mean(m, b) + 0.1 * own_mean(m, b[::1]),
        *("mean", own_mean, torch.full((B,), 1.1, dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_an_example_is(name: str) -> None:
    loss, reduction, own, factor = LOSSES[name]
    model, batch = network(), (IDS, LABELS)
    ones = per_example_gradients(model, own, batch)
    truth = {n: torch.einsum("b,b...->b...", factor.double(), g) for n, g in ones.items()}
    plain = copy.deepcopy(model)
    loss(plain, batch).backward()
    with pc.collect(model, pc.SqNorms(), pc.Moments(), loss_reduction=reduction) as record:
        loss(model, batch).backward()
    assert_norms(record, truth, 1e-9)
    for n, p in plain.named_parameters():
        total = truth[n].mean(0) if reduction == "mean" else truth[n].sum(0)
        assert p.grad is not None
        assert relative_error(p.grad, total) < 1e-9
        assert relative_error(model.get_parameter(n).grad, p.grad) < 1e-12
        assert relative_error(record.by_parameter[n].first_moment, truth[n].mean(0)) < 1e-9


def test_gradients_accumulate_over_blocks() -> None:
    """One for each micro-batch, whose loss is divided by their number."""
    model, plain = network(), network()
    own_mean(plain, (IDS, LABELS)).backward()
    norms = []
    for rows in (slice(0, 2), slice(2, 4)):
        with pc.collect(model, pc.SqNorms(), loss_scale=1 / 2) as record:
            (own_mean(model, (IDS[rows], LABELS[rows])) / 2).backward()
        norms.append(record.sq_norms)
    assert_grads_equal(model, plain, 1e-12)
    with pc.collect(plain, pc.SqNorms()) as record:
        own_mean(plain, (IDS, LABELS)).backward()
    assert relative_error(torch.cat(norms), record.sq_norms) < 1e-12


def test_the_scale_may_be_found_from_the_loss_when_backward_starts() -> None:
    """By a function that may differentiate it; passes that reach no parameter do not ask it."""
    model, asked = network(), list[Tensor]()
    truth = per_example_gradients(model, own_mean, (IDS, LABELS))
    own = list[Tensor]()

    def found(loss: Tensor) -> float:
        asked.append(loss)
        return torch.autograd.grad(loss, own, retain_graph=True)[0].item()

    with pc.collect(model, pc.SqNorms(), loss_scale=found) as record:
        own.append(own_mean(model, (IDS, LABELS)))
        loss = own[0] / 3 * 8
        torch.autograd.grad(loss, own, retain_graph=True)
        assert not asked
        loss.backward()
    assert asked == [loss]
    assert_norms(record, truth, 1e-9)
    copied = network()
    with pc.aggregate(copied, pc.NormClip(1e9), loss_scale=lambda _: 8 / 3):
        (own_mean(copied, (IDS, LABELS)) / 3 * 8).backward()
    assert_grads_equal(copied, model, 1e-12)


@pytest.mark.parametrize(("scale", "error"), [(0.0, ValueError), ("2", TypeError)])
def test_a_scale_that_is_found_is_checked(scale: Any, error: type[Exception]) -> None:
    model = network()
    with (
        pc.collect(model, pc.SqNorms(), loss_scale=lambda _: scale),
        pytest.raises(error, match="expected loss_scale to be a positive number"),
    ):
        own_mean(model, (IDS, LABELS)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_scale_that_is_found_is_of_one_loss() -> None:
    model = network()
    with pc.collect(model, pc.SqNorms(), loss_scale=lambda _: 1.0):
        loss = own_mean(model, (IDS, LABELS))
        with pytest.raises(ValueError, match="expected one loss"):
            torch.autograd.backward([loss, 2 * loss])


def test_two_losses_of_one_forward_pass_one_after_the_other() -> None:
    """Fine where no captured call is below both."""
    model = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)}).double()
    x = torch.randn(B, 6, dtype=torch.float64)

    def both(model: nn.Module, batch: Batch) -> Tensor:
        return sum(layer(batch[0]).square().sum(1).mean() for layer in model.values())

    truth = per_example_gradients(model, both, (x,))
    with pc.collect(model, pc.SqNorms()) as record:
        trunk = x.clone()
        losses = [layer(trunk).square().sum(1).mean() for layer in model.values()]
        for loss in losses:
            loss.backward(retain_graph=True)
    assert_norms(record, truth, 1e-9)


def test_frozen_regions_and_eval_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model = model.double().eval()
    x = torch.randn(B, 6, dtype=torch.float64)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            hidden = model[0](batch[0])
        return (model(batch[0]) - model[3](hidden)).square().sum(1).mean()

    truth = per_example_gradients(model, loss, (x,))
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, (x,)).backward()
    assert_norms(record, truth, 1e-9)


def test_a_model_can_be_copied_and_saved_in_a_block_and_after_it() -> None:
    model, copies = network(), list[nn.Module]()
    with pc.collect(model, pc.SqNorms()) as record:
        loss = own_mean(model, (IDS, LABELS))
        copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        loss.backward()
    copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        other.zero_grad()
        with pc.collect(other, pc.SqNorms()) as again:
            own_mean(other, (IDS, LABELS)).backward()
        assert torch.equal(again.sq_norms, record.sq_norms)


def by_grad(model: nn.Module, loss: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


def test_torch_autograd_grad_of_all_parameters_is_measured() -> None:
    model, batch = network(), (IDS, LABELS)
    truth = per_example_gradients(model, own_mean, batch)
    statistics = pc.SqNorms(), pc.Moments()
    with pc.collect(model, *statistics, keep_factors=True, loss_scale=8.0) as record:
        found = by_grad(model, own_mean(model, batch) * 8)
    assert_norms(record, truth, 1e-9)
    assert all(p.grad is None for p in model.parameters())
    assert_sums(record.weighted_sum(WEIGHTS), truth, WEIGHTS, 1e-9)
    for gradient, (name, g) in zip(found, truth.items(), strict=True):
        assert relative_error(gradient, 8 * g.mean(0)) < 1e-9
        assert relative_error(record.by_parameter[name].first_moment, g.mean(0)) < 1e-9


def test_losses_measured_one_after_the_other_by_torch_autograd_grad() -> None:
    """The record is of the last, be it by backward()."""
    model, batch = network(), (IDS, LABELS)
    truths = [per_example_gradients(model, loss, batch) for loss in (own_mean, own_sum)]
    with pc.collect(model, pc.SqNorms()) as record:
        losses = [token_losses(model, batch)]
        mean = (losses[0].sum(1) / KEPT).mean()
        by_grad(model, mean, retain_graph=True)
        assert_norms(record, truths[0], 1e-9)
        by_grad(model, losses[0].sum() / B, retain_graph=True)
        assert_norms(record, truths[1], 1e-9)
        mean.backward(retain_graph=True)
        assert_norms(record, truths[0], 1e-9)
        by_grad(model, losses[0].sum() / B)  # not measured any more
    assert_norms(record, truths[0], 1e-9)


def test_torch_autograd_grad_that_fails_leaves_no_statistics() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError

    with pc.collect(model, pc.SqNorms(), keep_factors=True) as record:
        hidden = model[0](torch.randn(B, 6, dtype=torch.float64))
        hidden.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            by_grad(model, model[1](hidden).sum())
    for read in (lambda: record.sq_norms, lambda: record.weighted_sum(WEIGHTS)):
        with pytest.raises(RuntimeError, match="no backward pass has run"):
            read()


def test_torch_autograd_grad_gives_a_robust_aggregate() -> None:
    models = [network(), network()]
    with pc.aggregate(models[0], pc.Winsorized(1)):
        own_mean(models[0], (IDS, LABELS)).backward()
    with pc.aggregate(models[1], pc.Winsorized(1)) as aggregate:
        found = by_grad(models[1], own_mean(models[1], (IDS, LABELS)))
    for gradient, p in zip(found, models[0].parameters(), strict=True):
        assert torch.equal(gradient, p.grad)
    assert set(aggregate.report.by_parameter) == {n for n, _ in models[1].named_parameters()}
