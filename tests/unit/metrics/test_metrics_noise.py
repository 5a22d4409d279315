"""Noise metrics: closed forms, and expectations taken exactly over every possible sample."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pycoherence import metrics

Sums = Callable[[Tensor], tuple[Tensor, Tensor, int]]

POPULATION = torch.tensor([[1.0, 0.5], [2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
SIGNAL = POPULATION.mean(0).square().sum()
NOISE = (POPULATION - POPULATION.mean(0)).square().sum(1).mean()


def samples(size: int) -> list[Tensor]:
    """Return every sample of ``size`` independent draws, all equally likely."""
    rows = itertools.product(range(len(POPULATION)), repeat=size)
    return [POPULATION[list(chosen)] for chosen in rows]


def mean_over_samples(metric: Callable[..., Tensor], sums: Sums, size: int, **options) -> Tensor:
    return torch.stack([metric(*sums(sample), **options) for sample in samples(size)]).mean()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_estimates_are_unbiased(sums: Sums, size: int) -> None:
    signal = mean_over_samples(metrics.gradient_sq_norm, sums, size)
    noise = mean_over_samples(metrics.gradient_variance, sums, size)
    torch.testing.assert_close(signal, SIGNAL)
    torch.testing.assert_close(noise, NOISE)


def test_plug_in_forms_have_the_documented_bias(sums: Sums) -> None:
    signal = mean_over_samples(metrics.gradient_sq_norm, sums, 3, unbiased=False)
    noise = mean_over_samples(metrics.gradient_variance, sums, 3, unbiased=False)
    torch.testing.assert_close(signal, SIGNAL + NOISE / 3)
    torch.testing.assert_close(noise, NOISE * 2 / 3)


def test_averaged_sums_give_the_true_noise_scale(sums: Sums) -> None:
    totals = [sums(sample) for sample in samples(3)]
    s = torch.stack([s for s, _, _ in totals]).mean()
    q = torch.stack([q for _, q, _ in totals]).mean()
    torch.testing.assert_close(metrics.noise_scale(s, q, 3), NOISE / SIGNAL)


@pytest.mark.parametrize(("few", "many"), [(1, 2), (1, 4), (2, 3)])
def test_averaged_two_batch_norms_give_the_true_noise_scale(few: int, many: int) -> None:
    small, big = (
        torch.stack([sample.mean(0).square().sum() for sample in samples(size)]).mean()
        for size in (few, many)
    )
    result = metrics.noise_scale_two_batch(small, big, few, many)
    torch.testing.assert_close(result, NOISE / SIGNAL)


def test_variance_agrees_with_torch(sums: Sums) -> None:
    for unbiased in (True, False):
        torch.testing.assert_close(
            metrics.gradient_variance(*sums(POPULATION), unbiased=unbiased),
            POPULATION.var(dim=0, unbiased=unbiased).sum(),
        )


def test_normalized_variance_is_variance_over_signal(sums: Sums) -> None:
    result = metrics.normalized_gradient_variance(*sums(POPULATION))
    torch.testing.assert_close(result, NOISE / SIGNAL)


def test_equal_gradients_carry_no_noise() -> None:
    s, q, n = 16.0, 4.0, 4
    assert metrics.gradient_variance(s, q, n) == 0
    assert metrics.noise_scale(s, q, n) == 0
    assert metrics.normalized_gradient_variance(s, q, n) == 0
    assert metrics.gradient_diversity(s, q) == 0.25
    assert metrics.batch_size_bound(s, q, n) == 1


def test_orthogonal_gradients_are_all_noise() -> None:
    s, q, n = 3.0, 3.0, 3
    assert metrics.gradient_sq_norm(s, q, n) == 0
    assert metrics.noise_scale(s, q, n) == math.inf
    assert metrics.gradient_diversity(s, q) == 1
    assert metrics.batch_size_bound(s, q, n) == 3


def test_cancelling_gradients_give_infinity_or_a_negative_estimate() -> None:
    s, q, n = 0.0, 2.0, 2
    assert metrics.gradient_diversity(s, q) == math.inf
    assert metrics.batch_size_bound(s, q, n) == math.inf
    assert metrics.normalized_gradient_variance(s, q, n) == math.inf
    assert metrics.noise_scale(s, q, n) < 0
