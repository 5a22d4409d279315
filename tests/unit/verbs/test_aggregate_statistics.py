"""Statistics in the pass of a rule, and rules that read them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import Batch, classification
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pycoherence as pc

RULES: dict[str, Callable[[], Any]] = {
    "coordinates": lambda: pc.Winsorized(1),
    "signs": lambda: pc.SignAgreement(0.5),
    "examples": lambda: pc.Krum(1),
    "both": lambda: pc.Bulyan(0),
    "carried": lambda: pc.CenteredClip(0.3),
    "clipped": lambda: pc.NormClip(0.3),
    "reweighted": lambda: pc.Reweight(lambda record: record.sq_norms.sqrt()),
}


def both(
    model: nn.Module, batch: Batch, rule: Any, *statistics: Any, reduction: Any = "mean"
) -> tuple[dict[str, Tensor], pc.Record]:
    model.zero_grad()
    with pc.aggregate(model, rule, *statistics, loss_reduction=reduction) as agg:
        classification(reduction)(model, batch).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, agg.record


def all_statistics() -> list[Any]:
    return [pc.SqNorms(), pc.Gram(), pc.Dots("mean"), pc.Moments(), pc.SignSum()]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_each_is_as_it_is_alone(name: str, rule: Any, reduction: Any) -> None:
    model, batch = larger(name)
    with pc.collect(model, *all_statistics(), loss_reduction=reduction) as alone:
        classification(reduction)(model, batch).backward()
    if isinstance(rule(), pc.Reweight):
        grads, _ = both(model, batch, rule(), pc.SqNorms(), reduction=reduction)
    else:
        grads, _ = aggregated(model, batch, rule(), reduction)
    found, record = both(model, batch, rule(), *all_statistics(), reduction=reduction)
    assert_gradients(found, grads)
    assert record.batch_size == B
    for result in ("sq_norms", "gram", "dots"):
        torch.testing.assert_close(getattr(record, result), getattr(alone, result))
    for parameter, each in alone.by_parameter.items():
        for result in ("first_moment", "second_moment", "sign_sum"):
            ours = getattr(record.by_parameter[parameter], result)
            torch.testing.assert_close(ours, getattr(each, result))
    assert record.coherence().m == pytest.approx(alone.coherence().m)


class CountedOps(TorchDispatchMode):
    """Counts the calls of ops of this library."""

    calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func.namespace == "pycoherence"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("rule", "statistic"),
    [
        (pc.NormClip(0.3), pc.SqNorms()),
        (pc.NormClip(0.3), pc.Gram()),
        (pc.AutoClip(per="parameter"), pc.SqNorms()),
        (pc.Reweight(lambda record: torch.arange(record.batch_size)), pc.SqNorms()),
        (pc.Krum(2, m=2), pc.Gram()),
        (pc.FromWeighting(lambda gram: gram.sum(1) / gram.sum()), pc.Gram()),
    ],
)
@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 5)])
def test_products_that_the_pass_has_measured_are_not_taken_again(
    rule: Any, statistic: Any, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(shape, dtype=torch.float64)
    with pc.aggregate(model, rule, nonfinite="drop"):
        model(x).square().mean().backward()
    alone = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with CountedOps() as measured, pc.collect(model, statistic):
        model(x).square().mean().backward()
    model.zero_grad()
    with CountedOps() as both, pc.aggregate(model, rule, statistic, nonfinite="drop"):
        model(x).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_gradients(found, alone)
    assert both.calls == measured.calls + len(found)  # a weighted sum of each


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_reweighted(reduction: Any, scale: float) -> None:
    model, batch = larger("transformer")
    each = gradients(model, batch, reduction)
    norms = sum(g.flatten(1).square().sum(1) for g in each.values())
    coef = (norms < norms.median()) / norms
    wanted = {
        n: torch.einsum("b,b...->...", coef, g) / (B if reduction == "mean" else 1)
        for n, g in each.items()
    }

    def function(record: pc.Record) -> Tensor:
        return (record.sq_norms < record.sq_norms.median()) / record.sq_norms

    model.zero_grad()
    options: Any = {"loss_reduction": reduction, "loss_scale": scale}
    with pc.aggregate(model, pc.Reweight(function), pc.SqNorms(), **options) as agg:
        (classification(reduction)(model, batch) * scale).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_gradients(found, {n: wanted[n] * scale for n in found})
    torch.testing.assert_close(agg.report.network.weights, coef / B)
    assert set(agg.report.by_parameter) == set(found)


def test_losses_may_weigh_too() -> None:
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    with pc.aggregate(model, pc.Reweight(lambda _: losses.argsort() < 2)):
        losses = model(x).square().sum(1)
        losses.mean().backward()
    found = model.weight.grad.clone()
    model.zero_grad()
    (model(x).square().sum(1)[losses.argsort() < 2].sum() / 5).backward()
    torch.testing.assert_close(found, model.weight.grad)


def test_weight_zero_leaves_out_what_is_not_finite() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    x[2] = float("inf")
    rule = pc.Reweight(lambda record: record.sq_norms.isfinite())
    with pc.aggregate(model, rule, pc.SqNorms()):
        model(x).mean().backward()
    assert torch.equal(model.weight.grad, torch.full((2, 3), 0.375))
    model.zero_grad()
    with pc.aggregate(model, pc.Reweight(lambda _: torch.ones(4)), nonfinite="drop") as agg:
        model(x).mean().backward()
    assert torch.equal(model.weight.grad, torch.full((2, 3), 0.375))
    assert agg.report.network.weights.tolist() == [0.25, 0.25, 0, 0.25]


def test_empty_batches() -> None:
    model, x = nn.Linear(3, 2), torch.empty(0, 3)
    rule = pc.Reweight(lambda record: record.sq_norms)
    with pc.aggregate(model, rule, pc.SqNorms(), loss_reduction="sum") as agg:
        model(x).sum().backward()
    assert agg.record.sq_norms.shape == (0,)
    assert not model.weight.grad.any()


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda record: record.sq_norms.tolist(), TypeError, "real tensor, got list"),
        (lambda record: record.sq_norms * 1j, TypeError, "real tensor, got torch.complex64"),
        (lambda record: record.sq_norms[1:], ValueError, r"each of 4 examples, got shape \(3,\)"),
        (lambda record: record.sq_norms.sum(), ValueError, r"got shape \(\)"),
        (lambda record: record.gram, AttributeError, "pc.Gram()"),
    ],
)
def test_coefficients_that_do_not_fit(function: Any, error: Any, words: str) -> None:
    model = nn.Linear(3, 2)
    with (
        pytest.raises(error, match=words),
        pc.aggregate(model, pc.Reweight(function), pc.SqNorms()),
    ):
        model(torch.ones(4, 3)).mean().backward()
    assert model.weight.grad is None


def test_bad_arguments() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="expected a function of the record, got 3"):
        pc.Reweight(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got a class; write SqNorms"):
        pc.aggregate(model, pc.Krum(1), pc.SqNorms)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected each statistic once"):
        pc.aggregate(model, pc.Krum(1), pc.SqNorms(), pc.SqNorms())
    with pytest.raises(RuntimeError, match="has not been entered"):
        _ = pc.aggregate(model, pc.Krum(1)).record


def test_without_statistics_the_record_says_what_is_missing() -> None:
    model = nn.Linear(3, 2)
    with pc.aggregate(model, pc.Median()) as agg:
        model(torch.ones(4, 3)).mean().backward()
    with pytest.raises(AttributeError, match="SqNorms"):
        _ = agg.record.sq_norms
    with pytest.raises(RuntimeError, match="keep_factors"):
        agg.record.weighted_sum(torch.ones(4))
