"""Coherence on vectors whose answer is known in closed form."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pycoherence import metrics

Sums = Callable[[Tensor], tuple[Tensor, Tensor, int]]


@pytest.mark.parametrize(
    ("shared", "expected"), [(1, (2.5, 0.625, 0.5)), (0, (1.0, 0.25, 0.0))], ids=["shared", "none"]
)
def test_toy_problem(sums: Sums, toy: Tensor, shared: int, expected: tuple[float, ...]) -> None:
    """With a feature that all share it is coherent, without one at the orthogonal limit."""
    toy[:, 5] *= shared
    s, q, n = sums(toy)
    found = metrics.m_coherence(s, q), metrics.alpha(s, q, n), metrics.unbiased_alpha(s, q, n)
    assert found == expected


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("directions", [1, 3, 4])
def test_copies_of_orthogonal_vectors(sums: Sums, copies: int, directions: int) -> None:
    s, q, n = sums(torch.eye(directions, dtype=torch.float64).repeat(copies, 1))
    assert metrics.m_coherence(s, q).item() == pytest.approx(copies)
    assert metrics.alpha(s, q, n).item() == pytest.approx(1 / directions)


def test_orthogonal_vectors_of_any_norm_have_m_coherence_one(sums: Sums) -> None:
    s, q, _ = sums(torch.diag(torch.tensor([1e-3, 2.0, 700.0], dtype=torch.float64)))
    assert metrics.m_coherence(s, q).item() == pytest.approx(1)


def test_opposite_vectors_cancel(sums: Sums) -> None:
    s, q, n = sums(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    assert metrics.alpha(s, q, n) == 0
    assert metrics.unbiased_alpha(s, q, n) == -1


def test_zero_vectors_dilute_in_proportion(sums: Sums, toy: Tensor) -> None:
    diluted = torch.cat([toy, torch.zeros(12, 6, dtype=torch.float64)])
    assert metrics.alpha(*sums(diluted)).item() == pytest.approx(0.25 * 0.625)
    assert metrics.m_coherence(*sums(diluted)[:2]) == 2.5


def test_mixture_of_orthogonal_populations_is_below_the_mean_of_alphas(sums: Sums) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(3, 4, dtype=torch.float64, generator=generator) + 1
    v = torch.randn(7, 4, dtype=torch.float64, generator=generator) - 0.5
    mixed = torch.cat([torch.cat([u, 0 * u], dim=1), torch.cat([0 * v, v], dim=1)])
    p = 0.3
    signal = p**2 * u.mean(0).square().sum() + (1 - p) ** 2 * v.mean(0).square().sum()
    size = p * u.square().sum(1).mean() + (1 - p) * v.square().sum(1).mean()
    value = metrics.alpha(*sums(mixed)).item()
    assert value == pytest.approx((signal / size).item())
    assert value <= p * metrics.alpha(*sums(u)) + (1 - p) * metrics.alpha(*sums(v))


def test_mean_distance_is_bounded_by_incoherence(sums: Sums, toy: Tensor) -> None:
    distance = torch.cdist(toy, toy).mean()
    alpha = metrics.alpha(*sums(toy))
    assert distance <= (2 * (1 - alpha) * toy.square().sum(1).mean()).sqrt()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_minibatch_alpha_is_exact_over_all_minibatches(sums: Sums, toy: Tensor, k: int) -> None:
    batches = torch.stack(
        [toy[list(rows)].mean(0) for rows in itertools.product(range(4), repeat=k)]
    )
    alpha = metrics.alpha(*sums(toy))
    inflated = metrics.alpha(*sums(batches))
    torch.testing.assert_close(inflated, metrics.minibatch_alpha(alpha, k))
    torch.testing.assert_close(alpha, metrics.example_alpha(inflated, k))


def test_minibatching_a_small_alpha_gains_its_size() -> None:
    assert metrics.minibatch_alpha(1e-9, k=50) == pytest.approx(50e-9)


def test_minibatching_keeps_the_ends() -> None:
    assert metrics.minibatch_alpha(0.0, k=7) == 0
    assert metrics.minibatch_alpha(1.0, k=7) == 1


def test_combine_leaves_out_a_layer_without_gradients() -> None:
    assert metrics.combine([float("nan"), 0.5], total_sq_norms=[0.0, 2.0]) == 0.5


def test_combine_takes_layers_along_the_first_dimension() -> None:
    values = torch.tensor([[1.0, 1.0, 2.0], [3.0, 5.0, 2.0]])
    weights = torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 9.0]])
    expected = torch.tensor([2.0, 2.0, 2.0])
    torch.testing.assert_close(metrics.combine(values, weights), expected)
    torch.testing.assert_close(metrics.combine(list(values), list(weights)), expected)
