"""Scores and weights of single examples."""

import math

import pytest
import torch
import torch.nn.functional as F

from pycoherence import metrics


def test_grand_is_the_norm() -> None:
    torch.testing.assert_close(
        metrics.grand(torch.tensor([4.0, 0.0, 9.0])), torch.tensor([2.0, 0.0, 3.0])
    )


def test_grand_averages_norms_and_not_squares() -> None:
    runs = torch.tensor([[1.0, 16.0], [9.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(metrics.grand(runs), torch.tensor([2.0, 2.0], dtype=torch.float64))


def test_el2n_is_the_norm_of_the_logit_gradient() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2, 1, 1, 0])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    torch.testing.assert_close(metrics.el2n(logits.detach(), targets), gradient.norm(dim=1))


def test_el2n_averages_runs() -> None:
    logits, targets = torch.randn(4, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.stack([metrics.el2n(run, targets) for run in logits]).mean(0)
    torch.testing.assert_close(metrics.el2n(logits, targets), expected)


def test_el2n_of_confident_predictions() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [1e4, 0.0, 0.0]])
    torch.testing.assert_close(
        metrics.el2n(logits, torch.tensor([0, 1])), torch.tensor([0.0, math.sqrt(2)])
    )


def test_clip_coefficients_follow_the_convention() -> None:
    norms = torch.tensor([0.0, 1.0, 2.0, 8.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 2 / (2 + 1e-6), 2 / (8 + 1e-6)], dtype=torch.float64)
    torch.testing.assert_close(
        metrics.clip_coefficients(norms**2, 2.0), expected, rtol=1e-14, atol=0
    )


def test_clip_coefficients_at_the_ends() -> None:
    sq_norms = torch.tensor([0.0, 1.0, math.inf, math.nan])
    coefficients = metrics.clip_coefficients(sq_norms, 1.0)
    assert coefficients[2] == 0
    assert coefficients[3].isnan()
    assert (metrics.clip_coefficients(sq_norms[:2], 0.0) == 0).all()
    assert (metrics.clip_coefficients(sq_norms[:2], math.inf) == 1).all()


def test_cge_drops_the_largest_and_keeps_order_among_equals() -> None:
    coefficients = metrics.cge_coefficients(torch.tensor([1.0, 5.0, 1.0, math.nan, 1.0]), f=3)
    assert coefficients.tolist() == [0.5, 0.0, 0.5, 0.0, 0.0]


def test_cge_without_faults_is_the_mean() -> None:
    assert metrics.cge_coefficients(torch.rand(4), f=0).tolist() == [0.25] * 4


def test_empty_batches_give_empty_results() -> None:
    empty = torch.empty(0)
    assert metrics.grand(empty).shape == (0,)
    assert metrics.clip_coefficients(empty, 1.0).shape == (0,)
    assert metrics.cge_coefficients(empty, 0).shape == (0,)
    assert metrics.el2n(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    values = torch.tensor([4.0, 9.0], dtype=dtype)
    assert metrics.grand(values).dtype == torch.float32
    assert metrics.clip_coefficients(values, 1.0).dtype == torch.float32
    assert metrics.cge_coefficients(values, 1).dtype == torch.float32
    assert metrics.el2n(values[None], torch.tensor([0])).dtype == torch.float32
