"""The generalisation bound against the sum written out by hand."""

import math

import pytest
import torch

from pycoherence import metrics


def by_hand(
    alphas: list[float], rates: list[float], n: int, lipschitz: float, smoothness: float
) -> float:
    total = 0.0
    for t, (alpha, rate) in enumerate(zip(alphas, rates, strict=True)):
        growth = math.prod(1 + later * smoothness for later in rates[t + 1 :])
        total += growth * rate * math.sqrt(2 * (1 - alpha))
    return lipschitz**2 / n * total


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_bound_is_the_sum_of_the_theorem(steps: int) -> None:
    alphas = [0.9, 0.5, 0.1, 0.0, 0.3][:steps]
    rates = [0.1, 0.2, 0.05, 0.1, 0.4][:steps]
    result = metrics.generalization_bound(alphas, rates, 20, lipschitz=3.0, smoothness=1.5)
    assert result == pytest.approx(by_hand(alphas, rates, 20, 3.0, 1.5))


def test_one_rate_serves_all_steps() -> None:
    alphas = [0.2, 0.4, 0.6]
    one = metrics.generalization_bound(alphas, 0.1, 8, smoothness=1.0)
    assert one == pytest.approx(metrics.generalization_bound(alphas, [0.1] * 3, 8, smoothness=1.0))


def test_coherence_counts_more_early() -> None:
    early = metrics.generalization_bound([0.9, 0.1], 0.1, 8, smoothness=1.0)
    late = metrics.generalization_bound([0.1, 0.9], 0.1, 8, smoothness=1.0)
    assert early < late


def test_full_coherence_leaves_no_gap() -> None:
    assert metrics.generalization_bound([1.0, 1.0], 0.1, 8, smoothness=1.0) == 0


def test_no_steps_leave_no_gap() -> None:
    assert metrics.generalization_bound([], 0.1, 8, smoothness=1.0) == 0


def test_estimates_outside_the_range_count_as_its_ends() -> None:
    outside = metrics.generalization_bound([-0.2, 1.0000001], 0.1, 8, smoothness=1.0)
    assert outside == metrics.generalization_bound([0.0, 1.0], 0.1, 8, smoothness=1.0)


def test_undefined_alpha_stays_undefined() -> None:
    assert math.isnan(metrics.generalization_bound([0.5, math.nan], 0.1, 8, smoothness=1.0))


def test_tensors_and_floats_agree() -> None:
    alphas, rates = [0.3, 0.8, 0.1], [0.1, 0.05, 0.2]
    expected = metrics.generalization_bound(alphas, rates, 8, smoothness=2.0)
    tensor = torch.tensor(alphas, dtype=torch.float64)
    for series in (tensor, list(tensor)):
        for steps in (rates, torch.tensor(rates, dtype=torch.float64)):
            result = metrics.generalization_bound(series, steps, 8, smoothness=2.0)
            assert isinstance(result, torch.Tensor)
            assert result.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"n >= 1, got 0"),
        ({"lipschitz": -1.0}, r"lipschitz >= 0, got -1"),
        ({"smoothness": math.nan}, r"smoothness >= 0, got nan"),
        ({"learning_rates": [0.1]}, r"one value per step"),
        ({"learning_rates": [0.1, -0.1]}, r"learning_rates >= 0, got -0\.1"),
        ({"alphas": torch.zeros(2, 2)}, r"alphas \[T\]"),
        ({"alphas": 0.5}, r"alphas \[T\]"),
    ],
)
def test_bad_values_say_what_to_do(options: dict, message: str) -> None:
    arguments = {"alphas": [0.1, 0.2], "learning_rates": 0.1, "n": 8, "smoothness": 1.0}
    with pytest.raises(ValueError, match=message):
        metrics.generalization_bound(**(arguments | options))
