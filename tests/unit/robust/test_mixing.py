"""Rules inside NNM, bucketing and ARC, on vectors that are mixed one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import plain_rules as plain
from support.models import MODELS
from support.raising import raising
from support.settings import workspace
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn

import pycoherence as pc

INNER: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "trimmed-mean": (pc.TrimmedMean(3), plain.coordinates("trimmed_mean", 3)),
    "median": (pc.Median(), plain.coordinates("median")),
    "meamed": (pc.MeaMed(2), plain.coordinates("meamed", 2)),
    "krum": (pc.Krum(3, 2), lambda g: plain.krum(g, 3, 2)),
    "bulyan": (pc.Bulyan(1), lambda g: plain.bulyan(g, 1)),
    "geometric-median": (
        pc.GeometricMedian(4, nu=0.1, tolerance=0),
        lambda g: plain.geometric_median(g, 4, 0.1, 0),
    ),
    "norm-clip": (pc.NormClip(0.4), lambda g: plain.norm_clip(g, 0.4)),
    "gaf": (pc.GAF(0.9), lambda g: plain.gaf(g, 0.9)),
}
MIXED: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "nnm": (lambda rule: pc.NNM(3, rule), lambda g: plain.nearest_mixed(g, 3)),
    "arc": (lambda rule: pc.ARC(2, rule), lambda g: plain.arc(g, 2)),
    "arc-nnm": (
        lambda rule: pc.ARC(4, pc.NNM(3, rule)),
        lambda g: plain.nearest_mixed(plain.arc(g, 4), 3),
    ),
    "nnm-arc": (
        lambda rule: pc.NNM(3, pc.ARC(4, rule)),
        lambda g: plain.arc(plain.nearest_mixed(g, 3), 4),
    ),
}
both = pytest.mark.parametrize(("inner", "mixed"), [(i, m) for i in INNER for m in MIXED])


def rows(n: int = 11) -> Tensor:
    return torch.randn(n, 30, generator=torch.Generator().manual_seed(n)).double()


@both
def test_on_vectors(inner: str, mixed: str) -> None:
    v = rows()
    rule, truth = MIXED[mixed][0](INNER[inner][0]), INNER[inner][1]
    expected = truth(MIXED[mixed][1](v))
    found, report = rule.with_report(v)
    torch.testing.assert_close(found, expected)
    if rule.order is None:
        torch.testing.assert_close(report.network.weights @ v, expected)


@pytest.mark.parametrize("name", MODELS)
@both
def test_on_models(name: str, inner: str, mixed: str) -> None:
    model, batch = larger(name)
    rule, truth = MIXED[mixed][0](INNER[inner][0]), INNER[inner][1]
    expected = plain.over_network(gradients(model, batch), lambda g: truth(MIXED[mixed][1](g)))
    found, report = aggregated(model, batch, rule)
    assert_gradients(found, expected, 1e-10)
    assert report.network is not None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("room", [2**10, 2**14])
def test_coordinates_in_parts(room: int, reduction: Any) -> None:
    """Tied weights, a scaled one and a table that is looked up: all kinds of factors."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(13, 8, padding_idx=0),
            "conv": nn.Conv1d(8, 8, 3, groups=2, padding=1),
            "norm": nn.LayerNorm(8),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)),
        }
    ).double()
    model.eval()
    ids = torch.randint(0, 13, (B, 6))

    def loss(model: Any, batch: Any) -> Tensor:
        x = model["table"](batch[0])
        x = model["norm"](model["conv"](x.mT).mT).tanh()
        x = model["spectral"](x) @ model["table"].weight[2:7, :3].tanh()
        losses = x.square().sum((1, 2))
        return losses.mean() if reduction == "mean" else losses.sum()

    each = plain_gradients(model, loss, (ids,))
    scale = 1 if reduction == "mean" else B
    with workspace(room):
        for rule, truth, mixed in (
            (pc.NNM(3, pc.TrimmedMean(2)), plain.coordinates("trimmed_mean", 2), "nnm"),
            (pc.ARC(2, pc.Bulyan(1)), lambda g: plain.bulyan(g, 1), "arc"),
        ):
            model.zero_grad()
            with pc.aggregate(model, rule, loss_reduction=reduction):
                loss(model, (ids,)).backward()
            points = MIXED[mixed][1]
            expected = plain.over_network(each, lambda g, f=truth, m=points: f(m(g)))
            found = {n: p.grad for n, p in model.named_parameters()}
            assert_gradients(found, {n: x * scale for n, x in expected.items()}, 1e-9)


def plain_gradients(model: Any, loss: Any, batch: Any) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for b in range(len(batch[0])):
        model.zero_grad()
        loss(model, tuple(x[b : b + 1] for x in batch)).backward()
        for n, p in model.named_parameters():
            found[n].append(p.grad.clone())
    return {n: torch.stack(x) for n, x in found.items()}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("n", "size"), [(11, 1), (21, 2), (31, 3)])
def test_bucketing(inner: str, n: int, size: int) -> None:
    rule, truth = INNER[inner]
    v = rows(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(4)).argsort().tolist()
    found = pc.Bucketing(size, rule, torch.Generator().manual_seed(4))(v)
    torch.testing.assert_close(found, truth(plain.buckets(v, order, size)))


def test_bucketing_draws_anew_and_with_its_generator() -> None:
    v = rows(12)
    generator = torch.Generator().manual_seed(4)
    rule = pc.Bucketing(3, pc.Median(), generator)
    first, second = rule(v), rule(v)
    assert not torch.equal(first, second)
    generator.manual_seed(4)
    assert torch.equal(first, rule(v))


@pytest.mark.parametrize("inner", ["trimmed-mean", "krum", "bulyan", "geometric-median", "gaf"])
@pytest.mark.parametrize("mixed", MIXED)
def test_not_finite(inner: str, mixed: str) -> None:
    v = rows(13)
    v[4] = torch.nan
    rule = MIXED[mixed][0](INNER[inner][0])
    assert rule(v).isnan().all()
    expected = INNER[inner][1](MIXED[mixed][1](torch.cat([v[:4], v[5:]])))
    torch.testing.assert_close(rule(v, nonfinite="drop"), expected)


def test_too_few_left() -> None:
    v = rows()
    v[:4] = torch.nan
    for rule in (pc.NNM(3, pc.TrimmedMean(4)), pc.NNM(1, pc.Krum(4)), pc.ARC(4, pc.Median())):
        assert rule(v, nonfinite="drop").isnan().all(), rule


COORDINATES = [
    pc.NNM(1, pc.Median()),
    pc.ARC(1, pc.Median()),
    pc.Bucketing(2, pc.Median()),
    pc.NNM(0, pc.Bulyan(0)),
    pc.Bucketing(2, pc.NNM(1, pc.Median())),
    pc.NNM(1, pc.Krum(1)),
]


@pytest.mark.parametrize("rule", COORDINATES)
def test_no_examples_have_no_gradient(rule: Any) -> None:
    assert torch.equal(rule(torch.zeros(0, 3)), torch.zeros(3))
    model, x = nn.Linear(3, 1, bias=False), torch.zeros(0, 3)
    with pc.aggregate(model, rule, loss_reduction="sum"):
        model(x).sum().backward()
    assert torch.equal(model.weight.grad, torch.zeros(1, 3))


def test_empty_buckets_are_left_out() -> None:
    v = rows(4)
    v[[0, 2]] = torch.nan
    found = pc.Bucketing(1, pc.Median())(v, nonfinite="drop")
    torch.testing.assert_close(found, v[[1, 3]].mean(0))


def test_the_centre_of_a_rule_inside_is_carried_over() -> None:
    rule, centre = pc.NNM(3, pc.CenteredClip(0.7, 2)), torch.zeros(30).double()
    for n in (11, 9):
        centre = plain.centered_clip(plain.nearest_mixed(rows(n), 3), centre, 0.7, 2)
        torch.testing.assert_close(rule(rows(n)), centre)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_float32_mixtures_that_nearly_agree(spread: float) -> None:
    v = torch.randn(1, 50) + spread * torch.randn(12, 50)
    found = pc.NNM(4, pc.GeometricMedian())(v)
    mixed = plain.nearest_mixed(v.double(), 4)
    expected = plain.geometric_median(mixed, 100, 1e-6, 1e-6)
    assert (found - expected).norm() <= 0.01 * (mixed - expected).norm(dim=1).mean() + 1e-5


test_values = raising(
    ValueError,
    {
        "nnm": (lambda: pc.NNM(-1, pc.Median()), "f to be at least 0"),
        "few": (lambda: pc.NNM(3, pc.Median())(rows(3)), r"batch of f \+ 1 = 4 examples or more"),
        "inside": (lambda: pc.NNM(1, pc.Krum(4))(rows(7)), r"2f \+ 3 = 11 examples or more, got 7"),
        "arc": (lambda: pc.ARC(3, pc.Median())(rows(6)), r"2f \+ 1 = 7 examples or more, got 6"),
        "bucket": (lambda: pc.Bucketing(0, pc.Median()), "size to be at least 1"),
        "buckets": (
            lambda: pc.Bucketing(3, pc.TrimmedMean(2))(rows(10)),
            "makes 4 buckets, and inside clips k = 2.*needs 5 examples, got 10",
        ),
        "noise": (lambda: pc.NNM(1, pc.NormClip(1.0, 2.0)), "a rule without noise inside NNM"),
        "mda": (lambda: pc.MDA(3)(rows(6)), r"2f \+ 1 = 7 examples or more, got 6"),
        "monna": (lambda: pc.MoNNA(1, 5)(rows(5)), "trusts example 5, for which a batch needs 6"),
        "smea": (lambda: pc.SMEA(12)(rows(25)), "25 have 5200300, and takes up to 200000; MDA"),
        "weights": (lambda: pc.NNM(1, pc.Median())(rows(5), weights=[1] * 5), "counts all vectors"),
    },
)
test_types = raising(
    TypeError,
    {
        "class": (lambda: pc.NNM(1, pc.Median), r"got a class; write pc.Median\(\.\.\.\)"),
        "record": (lambda: pc.NNM(1, pc.Reweight(len)), "reads the record of the examples"),
        "rule": (lambda: pc.ARC(1, "median"), "a rule such as pc.Winsorized.*got 'median'"),
        "generator": (lambda: pc.Bucketing(2, pc.Median(), 3), "torch.Generator, got int"),
    },
)
