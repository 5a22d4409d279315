"""Errors of coherence against examples really left out, and against samples drawn anew."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.angles import equal, gradient_lists
from support.raising import raising
from torch import Tensor

from pycoherence import metrics

Z = 1.959963984540054


def sums(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Dots with the mean and squared norms of gradients [..., n, P]."""
    mean = gradients.mean(-2, keepdim=True)
    return (gradients * mean).sum(-1), gradients.square().sum(-1)


def alpha(gradients: Tensor) -> float:
    """Mean dot product over all pairs of two over the mean squared norm, pair by pair."""
    n = len(gradients)
    pairs = [(gradients[i] @ gradients[j]).item() for i in range(n) for j in range(n) if i != j]
    mean_square = gradients.square().sum().item() / n
    return math.fsum(pairs) / (n * (n - 1)) / mean_square if mean_square else math.nan


def left_out(gradients: Tensor) -> list[float]:
    n = len(gradients)
    return [alpha(gradients[[j for j in range(n) if j != i]]) for i in range(n)]


def slow_error(gradients: Tensor) -> float:
    values, n = left_out(gradients), len(gradients)
    mean = sum(values) / n
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in values))


def close(result: Tensor, expected: float) -> None:
    equal(result, expected, 1e-9)


@given(gradient_lists(min_n=3))
def test_as_if_each_example_were_left_out(gradients: Tensor) -> None:
    value, error, low, high = metrics.alpha_interval(*sums(gradients))
    expected = alpha(gradients), slow_error(gradients)
    close(value, expected[0])
    close(error, expected[1])
    close(low, expected[0] - Z * expected[1])
    close(high, expected[0] + Z * expected[1])


@given(gradient_lists(min_n=3))
def test_that_of_m_is_that_of_alpha_for_this_many(gradients: Tensor) -> None:
    n, dots, sq_norms = len(gradients), *sums(gradients)
    alphas = metrics.alpha_interval(dots, sq_norms)
    found = metrics.m_coherence_interval(dots, sq_norms)
    for each in ("value", "low", "high"):
        torch.testing.assert_close(
            getattr(found, each), 1 + (n - 1) * getattr(alphas, each), equal_nan=True
        )
    torch.testing.assert_close(found.error, (n - 1) * alphas.error, equal_nan=True)
    s, q = metrics.gram_sums(gradients @ gradients.T)
    torch.testing.assert_close(found.value, metrics.m_coherence(s, q), equal_nan=True)


@given(gradient_lists(min_n=3), st.floats(1e-3, 1e3), st.randoms())
def test_scale_and_order_do_not_matter(gradients: Tensor, scale: float, random) -> None:
    order = random.sample(range(len(gradients)), len(gradients))
    torch.testing.assert_close(
        metrics.alpha_interval(*sums(scale * gradients[order])),
        metrics.alpha_interval(*sums(gradients)),
        rtol=1e-7,
        atol=1e-7,
        equal_nan=True,
    )


def test_the_toy_problem_is_the_same_without_any(toy: Tensor) -> None:
    """With a shared feature M is 2.5 of 4; without it, 1."""
    shared = metrics.m_coherence_interval(*sums(toy))
    assert (shared.value, shared.error) == (2.5, 0)
    alone = metrics.m_coherence_interval(*sums(toy[:, :5]))
    assert alone == (1, 0, 1, 1)


def test_equal_gradients_leave_no_doubt() -> None:
    found = metrics.alpha_interval(torch.full((5,), 0.3), torch.full((5,), 0.3))
    close(found.value, 1)
    assert found.error < 1e-6


def test_layers_and_steps() -> None:
    gradients = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0)).double()
    found = metrics.m_coherence_interval(*sums(gradients))
    assert found.value.shape == (2, 3)
    for i, j in ((0, 0), (1, 2)):
        close(found.error[i, j], 6 * slow_error(gradients[i, j]))


def test_nothing_left() -> None:
    zeros, one = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert all(each.isnan() for each in metrics.alpha_interval(zeros, zeros))
    value, *others = metrics.m_coherence_interval(one / 4, one)
    assert value == 1
    assert all(each.isnan() for each in others)


def test_nan_is_never_dropped() -> None:
    dots = torch.tensor([1.0, math.nan, 1.0, 2.0])
    assert all(each.isnan() for each in metrics.alpha_interval(dots, torch.ones(4)))


def test_dots_in_float32_are_enough() -> None:
    """Where most cancels, and S is a small part of Q."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    gradients -= 0.9 * gradients.mean(0)
    exact = metrics.m_coherence_interval(*sums(gradients))
    assert exact.value < 0.1
    rounded = metrics.m_coherence_interval(*sums(gradients.float()))
    assert {each.dtype for each in rounded} == {torch.float32}
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-3, atol=1e-4)


def test_half_precision_is_promoted() -> None:
    halves = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)
    found = metrics.alpha_interval(halves, halves)
    assert found.error.dtype == torch.float32
    assert found == metrics.alpha_interval(halves.float(), halves.float())


def drawn(mean: float, n: int, times: int = 1000) -> tuple[Tensor, float]:
    """Samples `[times, n, P]` around a mean, and the alpha of what they are drawn from."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.3, 2.0, 20, dtype=torch.float64)
    noise = torch.randn(times, n, 20, generator=generator, dtype=torch.float64)
    signal = 20 * mean**2
    return mean + noise * sizes, signal / (signal + sizes.square().sum().item())


@pytest.mark.parametrize("mean", [0.2, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(mean: float) -> None:
    gradients, truth = drawn(mean, n=40)
    for level, least, most in ((0.95, 0.9, 0.99), (0.5, 0.42, 0.7)):
        found = metrics.alpha_interval(*sums(gradients), level)
        held = (found.low <= truth) & (truth <= found.high)
        assert least < held.double().mean() < most
    assert found.value.mean().item() == pytest.approx(truth, rel=0.1)
    assert 0.9 < found.error.mean() / found.value.std() < 1.4


def test_at_the_orthogonal_limit_the_error_is_too_large() -> None:
    gradients, truth = drawn(0.0, n=40)
    found = metrics.m_coherence_interval(*sums(gradients))
    assert truth == 0
    assert 1.2 < found.error.square().mean().sqrt() / found.value.std() < 1.7
    held = (found.low <= 1) & (found.high >= 1)
    assert held.double().mean() > 0.95


def test_a_few_large_gradients_make_intervals_too_narrow() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = 1 + torch.randn(1000, 200, 20, generator=generator, dtype=torch.float64)
    spread = torch.randn(1000, 200, 1, generator=generator, dtype=torch.float64)
    truth = 0.5 * math.exp(-(1.5**2))
    found = metrics.alpha_interval(*sums((1.5 * spread).exp() * gradients))
    held = (found.low <= truth) & (truth <= found.high)
    assert 0.4 < held.double().mean() < 0.85
    assert found.value.mean() > 1.2 * truth


def test_the_error_of_alpha_shrinks_with_the_sample_and_that_of_m_grows() -> None:
    small, large = (metrics.alpha_interval(*sums(drawn(1.0, n)[0])).error.mean() for n in (40, 160))
    assert 1.6 < small / large < 2.4
    small, large = (
        metrics.m_coherence_interval(*sums(drawn(1.0, n)[0])).error.mean() for n in (40, 160)
    )
    assert 1.6 < large / small < 2.4


test_bad_values_say_what_to_do = raising(
    ValueError,
    {
        "few": (
            lambda: metrics.alpha_interval(torch.ones(2), torch.ones(2)),
            r"alpha_interval: expected dots \[\.\.\., n\] of 3 examples or more, got \[2\]; pass",
        ),
        "scalar": (
            lambda: metrics.m_coherence_interval(torch.tensor(1.0), torch.tensor(1.0)),
            r"m_coherence_interval: expected dots .*got \[\]",
        ),
        "shapes": (
            lambda: metrics.alpha_interval(torch.ones(3), torch.ones(4)),
            r"one shape, got .*\[3\].*\[4\]",
        ),
        "level": (
            lambda: metrics.alpha_interval(torch.ones(3), torch.ones(3), 95),
            r"level in \(0, 1\), got 95; pass 0\.95 for 95%",
        ),
    },
)
test_bad_types_say_what_to_do = raising(
    TypeError,
    {
        "integers": (
            lambda: metrics.alpha_interval(torch.ones(3).long(), torch.ones(3)),
            r"dots .*got torch\.int64",
        ),
        "devices": (
            lambda: metrics.m_coherence_interval(torch.ones(3), torch.ones(3, device="meta")),
            r"one device",
        ),
    },
)
