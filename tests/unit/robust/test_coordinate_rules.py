"""Rules over coordinates against the papers' formulas, on gradients taken one at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import plain_rules as plain
from support.models import MODELS
from support.raising import raising
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor

import pycoherence as pc

RULES: dict[str, tuple[object, Callable[[Tensor], Tensor]]] = {
    "winsorized": (pc.Winsorized(2), plain.coordinates("winsorized_mean", 2)),
    "winsorized-most": (pc.Winsorized(5), plain.coordinates("winsorized_mean", 5)),
    "trimmed-mean": (pc.TrimmedMean(3), plain.coordinates("trimmed_mean", 3)),
    "median": (pc.Median(), plain.coordinates("median")),
    "lower-median": (pc.Median(lower=True), plain.coordinates("lower_median")),
    "median-of-means": (pc.MedianOfMeans(3), plain.coordinates("median_of_means", 3)),
    "median-of-means-even": (pc.MedianOfMeans(4), plain.coordinates("median_of_means", 4)),
    "sign-agreement": (pc.SignAgreement(0.4), plain.coordinates("sign_agreement", 0.4)),
    "phocas": (pc.Phocas(2), plain.coordinates("phocas", 2)),
    "meamed": (pc.MeaMed(4), plain.coordinates("meamed", 4)),
}
THE_MEAN = (
    *(pc.Winsorized(0), pc.TrimmedMean(0), pc.MedianOfMeans(1), pc.SignAgreement(0)),
    *(pc.Phocas(0), pc.MeaMed(0)),
)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_as_in_the_paper(name: str, rule: str, reduction: str) -> None:
    model, batch = larger(name)
    ours, truth = RULES[rule]
    expected = plain.by_parameter(gradients(model, batch, reduction), truth)
    if reduction == "sum":
        expected = {n: x * B for n, x in expected.items()}
    found, _ = aggregated(model, batch, ours, reduction)
    assert_gradients(found, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_float32(name: str, rule: str) -> None:
    """But for the thresholds of sign agreement, small errors make small differences."""
    model, batch = larger(name, torch.float32)
    ours, truth = RULES[rule]
    found, _ = aggregated(model, batch, ours)
    assert all(g.dtype == torch.float32 for g in found.values())
    if rule != "sign-agreement":
        assert_gradients(found, plain.by_parameter(gradients(model, batch), truth), 2e-5)


@pytest.mark.parametrize("rule", THE_MEAN, ids=str)
def test_without_robustness_it_is_the_mean(rule: object) -> None:
    model, batch = larger("cnn")
    expected = {n: g.mean(0) for n, g in gradients(model, batch).items()}
    assert_gradients(aggregated(model, batch, rule)[0], expected)


@pytest.mark.parametrize("rule", [pc.Winsorized(2), pc.TrimmedMean(2), pc.Median(), pc.Phocas(2)])
def test_an_outlier_does_not_disturb_the_others(rule: object) -> None:
    model, (inputs, labels) = larger("mlp", torch.float32)
    inputs[3] *= 1e12
    found, _ = aggregated(model, (inputs, labels), rule)
    usual = max(g.abs().max() for g in gradients(model, (inputs[4:], labels[4:])).values())
    assert max(g.abs().max() for g in found.values()) <= usual


def test_not_finite() -> None:
    model, (inputs, labels) = larger("mlp")
    inputs[2, 0] = torch.nan
    others = [b for b in range(B) if b != 2]
    found, _ = aggregated(model, (inputs, labels), pc.Winsorized(2))
    assert all(g.isnan().all() for g in found.values())
    found, _ = aggregated(model, (inputs, labels), pc.Winsorized(2), nonfinite="drop")
    left = gradients(model, (inputs[others], labels[others]))
    assert_gradients(found, plain.by_parameter(left, plain.coordinates("winsorized_mean", 2)))


@pytest.mark.parametrize("rule", RULES)
def test_too_few_left_are_not_a_number(rule: str) -> None:
    model, (inputs, labels) = larger("mlp")
    inputs[:] = torch.nan
    found, _ = aggregated(model, (inputs, labels), RULES[rule][0], nonfinite="drop")
    assert all(g.isnan().all() for g in found.values())


def test_numbers_of_numpy() -> None:
    assert repr(pc.Winsorized(np.int64(2))) == "Winsorized(k=2)"
    assert pc.Krum(np.int32(1), m=np.int64(3)) == pc.Krum(1, 3)
    assert pc.CenteredClip(np.float32(0.5)).radius == 0.5
    model, batch = larger("mlp")
    whole, _ = aggregated(model, (batch[0][:10], batch[1][:10]), pc.Winsorized(1), group_size=2)
    part = aggregated(
        model, (batch[0][:10], batch[1][:10]), pc.Winsorized(np.int64(1)), group_size=np.int64(2)
    )[0]
    assert all(torch.equal(g, part[n]) for n, g in whole.items())


def test_reports() -> None:
    model, batch = larger("mlp")
    names = [n for n, _ in model.named_parameters()]
    for rule, clipped in (
        (pc.Winsorized(2), 4 / B),
        (pc.TrimmedMean(5), 10 / B),
        (pc.Median(), None),
    ):
        _, report = aggregated(model, batch, rule)
        assert (report.batch_size, report.network) == (B, None)
        assert {n: one.clipped for n, one in report.by_parameter.items()} == dict.fromkeys(
            names, clipped
        )
    found, report = aggregated(model, batch, pc.SignAgreement(0.5))
    kept = {n: one.kept for n, one in report.by_parameter.items()}
    assert kept == {n: (g != 0).double().mean().item() for n, g in found.items()}
    assert 0 < kept["0.weight"] < 1


@pytest.mark.parametrize(
    ("c", "size", "k"),
    [
        (0, 7, 0),
        (1, 100, 1),
        (2, 100, 2),
        (8, 100, 8),
        (10, 16, 2),
        (50, 5, 2),
        (50, 4, 1),
    ],
)
def test_percentiles(c: float, size: int, k: int) -> None:
    assert pc.Winsorized.from_percentile(c, size) == pc.Winsorized(k)


def test_a_percentile_that_clips_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"c = 1 percent of batch_size = 32 rounds to k = 0"):
        assert pc.Winsorized.from_percentile(1, 32) == pc.Winsorized(0)


test_values = raising(
    ValueError,
    {
        "winsorized": (lambda: pc.Winsorized(-1), "k to be at least 0, got -1"),
        "trimmed": (lambda: pc.TrimmedMean(-1), "k to be at least 0"),
        "phocas": (lambda: pc.Phocas(-2), "k to be at least 0"),
        "meamed": (lambda: pc.MeaMed(-2), "k to be at least 0"),
        "groups": (lambda: pc.MedianOfMeans(0), "groups to be at least 1, got 0"),
        "threshold": (lambda: pc.SignAgreement(1.5), "threshold from 0 to 1, got 1.5"),
        "below": (lambda: pc.SignAgreement(-0.5), "threshold to be zero or more"),
        "nan": (lambda: pc.SignAgreement(float("nan")), "threshold to be zero or more, got nan"),
        "percentile": (lambda: pc.Winsorized.from_percentile(51, 9), "at most 50 on each side"),
        "size": (lambda: pc.Winsorized.from_percentile(5, 0), "batch_size to be at least 1"),
    },
)
test_types = raising(
    TypeError,
    {
        "float": (lambda: pc.Winsorized(1.0), "k to be an integer, got 1.0"),
        "bool": (lambda: pc.TrimmedMean(True), "k to be an integer, got True"),
        "groups": (lambda: pc.MedianOfMeans(2.5), "groups to be an integer"),
        "threshold": (lambda: pc.SignAgreement("0.5"), "threshold to be a number, got '0.5'"),
    },
)
