"""Statistics of single coordinates: signal, noise and signs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.angles import equal
from torch import Tensor

from pycoherence import metrics

NAN, INF = torch.nan, torch.inf


def moments(gradients: Tensor) -> tuple[Tensor, Tensor]:
    return gradients.mean(0), gradients.square().mean(0)


def test_gsnr_by_hand() -> None:
    # Mean 2 and variance 1; all equal; mean 0; all zero.
    gradients = torch.tensor([[1.0, 5.0, 1.0, 0.0], [3.0, 5.0, -1.0, 0.0]])
    equal(metrics.gsnr(*moments(gradients)), [4.0, INF, 0.0, NAN])
    equal(metrics.coordinate_alpha(*moments(gradients)), [0.8, 1.0, 0.0, NAN])


def test_gsnr_of_the_unbiased_variance_follows_from_the_biased() -> None:
    gradients = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unbiased = gradients.mean(0).square() / gradients.var(0, correction=1)
    torch.testing.assert_close(metrics.gsnr(*moments(gradients)) * 4 / 5, unbiased)


def test_the_toy_problem(toy: Tensor) -> None:
    first, second = moments(toy)
    equal(metrics.gsnr(first, second), [1 / 3] * 4 + [NAN, INF])
    equal(metrics.coordinate_alpha(first, second), [0.25] * 4 + [NAN, 1.0])
    equal(metrics.combine(metrics.coordinate_alpha(first, second), second), 0.625)
    equal(metrics.osgr(first, second, n=4), 20 / 23)
    signs = toy.sign().sum(0)
    equal(metrics.sign_agreement(signs, n=4), [0.25] * 4 + [0.0, 1.0])
    equal(metrics.same_sign_share(signs, n=4), [0.625] * 4 + [0.5, 1.0])
    equal(metrics.sign_vote(signs), [-1.0] * 4 + [0.0, -1.0])


def test_osgr_by_hand() -> None:
    # r = (1, 1/4), rho^2 = (1, 4), n = 2: W is (1 + 1/2, 1 + 2) / 4.5.
    first, second = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 5.0])
    by_hand = 1 - ((1.5 / 4.5) / (1 + 0.5) + (3 / 4.5) / (0.25 + 0.5)) / 2
    assert metrics.osgr(first, second, n=2).item() == pytest.approx(by_hand)
    assert by_hand == pytest.approx(4 / 9)


def test_osgr_goes_to_one_with_more_data() -> None:
    ratios = [metrics.osgr(1.0, 5.0, n) for n in (1, 4, 100, 10**9)]
    assert ratios[0] == 0.2  # alpha: one example's step, seen by another one
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1)


def test_osgr_at_the_ends() -> None:
    ones = torch.ones(3)
    assert metrics.osgr(ones, ones, 2) == 1
    assert metrics.osgr(0 * ones, ones, 2) == 0
    assert metrics.osgr(0 * ones, 0 * ones, 2).isnan()


def test_variance_below_zero_by_rounding_counts_as_zero() -> None:
    first = torch.tensor([1.0 + 1e-7])
    assert metrics.gsnr(first, torch.ones(1)).item() == INF
    assert metrics.osgr(first, torch.ones(1), 2) == 1


def test_floats_give_floats() -> None:
    values = [metrics.gsnr(1.0, 5.0), metrics.coordinate_alpha(1.0, 5.0), metrics.osgr(1.0, 5.0, 1)]
    values += [metrics.sign_agreement(-3.0, 4), metrics.same_sign_share(-3.0, 4)]
    values += [metrics.sign_vote(-3.0)]
    assert values == [0.25, 0.2, 0.2, 0.75, 0.875, -1.0]
    assert all(type(value) is float for value in values)


def test_shapes_are_those_of_the_parameter() -> None:
    first, second = torch.rand(2, 3, 4), torch.rand(2, 3, 4) + 1
    for function in (metrics.gsnr, metrics.coordinate_alpha):
        assert function(first, second).shape == (2, 3, 4)
    for function in (metrics.sign_agreement, metrics.same_sign_share):
        assert function(first, 2).shape == (2, 3, 4)
    assert metrics.sign_vote(first).shape == (2, 3, 4)
    assert metrics.osgr(first, second, 2).shape == ()


def test_empty_parameters() -> None:
    empty = torch.empty(0, 3)
    assert metrics.gsnr(empty, empty).shape == (0, 3)
    assert metrics.coordinate_alpha(empty, empty).shape == (0, 3)
    assert metrics.osgr(empty, empty, 1).isnan()
    assert metrics.sign_agreement(empty, 1).shape == (0, 3)
    assert metrics.same_sign_share(empty, 1).shape == (0, 3)
    assert metrics.sign_vote(empty).shape == (0, 3)


def test_a_single_example_agrees_with_itself() -> None:
    gradient = torch.tensor([[2.0, -3.0, 0.0]])
    equal(metrics.gsnr(*moments(gradient)), [INF, INF, NAN])
    equal(metrics.coordinate_alpha(*moments(gradient)), [1.0, 1.0, NAN])
    assert metrics.osgr(*moments(gradient), n=1) == 1
    equal(metrics.sign_agreement(gradient[0].sign(), 1), [1.0, 1.0, 0.0])


def test_nan_is_never_dropped() -> None:
    bad, good = torch.tensor([NAN, 1.0]), torch.tensor([2.0, 2.0])
    for function in (metrics.gsnr, metrics.coordinate_alpha):
        assert function(bad, good).isnan().tolist() == [True, False]
        assert function(good, bad).isnan().tolist() == [True, False]
    assert metrics.osgr(bad, good, 2).isnan()
    assert metrics.osgr(good, bad, 2).isnan()
    assert metrics.sign_agreement(bad, 2).isnan().tolist() == [True, False]
    assert metrics.same_sign_share(bad, 2).isnan().tolist() == [True, False]
    assert metrics.sign_vote(bad).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 3.0], dtype=dtype)
    results = [metrics.gsnr(values, 9 * values), metrics.coordinate_alpha(values, 9 * values)]
    results += [metrics.osgr(values, 9 * values, 2), metrics.sign_vote(values)]
    results += [metrics.sign_agreement(values, 4), metrics.same_sign_share(values, 4)]
    assert {result.dtype for result in results} == {torch.float32}


PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "gsnr": metrics.gsnr,
    "coordinate_alpha": metrics.coordinate_alpha,
    "osgr": lambda first, second: metrics.osgr(first, second, 2),
}


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS.keys())
def test_moments_must_agree(function: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"one shape, got .*\[3\].*\[2\]}; pass"):
        function(torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match=r"one device, got \['cpu', 'meta'\]"):
        function(torch.ones(2), torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match=r"second_moment to be a floating-point tensor"):
        function(torch.ones(2), torch.ones(2).long())


@pytest.mark.parametrize("function", [metrics.sign_agreement, metrics.same_sign_share])
def test_sign_sums_need_a_count(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"n >= 1, got 0; pass the number of examples"):
        function(0.0, 0)
    with pytest.raises(TypeError, match=r"n to be an integer, got float"):
        function(0.0, 1.5)
    with pytest.raises(TypeError, match=r"sign_sum to be a floating-point tensor"):
        function(torch.ones(2).long(), 2)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"n >= 1, got 0; pass the number of training examples"):
        metrics.osgr(1.0, 1.0, 0)
    with pytest.raises(TypeError, match=r"sign_sum to be a floating-point tensor"):
        metrics.sign_vote(torch.ones(2).long())


def test_pure_noise_reads_what_the_docstrings_say() -> None:
    n = 400
    noise = torch.randn(n, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = noise.sign().sum(0)
    assert metrics.gsnr(*moments(noise)).mean().item() == pytest.approx(1 / n, rel=0.1)
    agreement = metrics.sign_agreement(signs, n).mean().item()
    assert agreement == pytest.approx(0.8 / math.sqrt(n), rel=0.1)
