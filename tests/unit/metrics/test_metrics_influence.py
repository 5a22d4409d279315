"""What a step does to a loss: first-order changes and TracIn."""

import pytest
import torch
from support.raising import raising
from torch import Tensor

from pycoherence import metrics

DOTS = torch.tensor([8.0, 0.0, -2.0])


def equal(result: Tensor, expected: list) -> None:
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=result.dtype), rtol=1e-6, atol=1e-6
    )


def test_loss_change_is_that_of_a_small_step() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, rate = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 1e-6
    gradients = 2 * (x @ w)[:, None] * x  # of the losses (x w)^2
    step = -rate * gradients.mean(0)
    change = (x @ (w + step)).square() - (x @ w).square()
    predicted = metrics.loss_change(gradients @ gradients.mean(0), rate)
    torch.testing.assert_close(change, predicted, rtol=1e-4, atol=1e-12)


def test_loss_change_of_floats() -> None:
    assert metrics.loss_change(3.0, learning_rate=0.5) == -1.5


def test_tracin_sums_over_checkpoints() -> None:
    grams = torch.tensor([[[1.0, 2.0], [0.0, -4.0]], [[2.0, 0.0], [1.0, 1.0]]])
    equal(metrics.tracin(grams, [0.5, 2.0]), [[4.5, 1.0], [2.0, 0.0]])
    equal(metrics.tracin(list(grams), torch.tensor([0.5, 2.0])), [[4.5, 1.0], [2.0, 0.0]])
    equal(metrics.tracin(grams, 2.0), [[6.0, 4.0], [2.0, -6.0]])


def test_tracin_on_the_mean_of_a_validation_set_is_the_mean_of_its_influences() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(3, 4, 7, dtype=torch.float64, generator=generator)
    validation = torch.randn(3, 5, 7, dtype=torch.float64, generator=generator)
    pairwise = metrics.tracin(train @ validation.mT, [0.1, 0.2, 0.3])
    dots = (train @ validation.mean(1, keepdim=True).mT).squeeze(-1)
    torch.testing.assert_close(metrics.tracin(dots, [0.1, 0.2, 0.3]), pairwise.mean(1))


def test_self_influence_is_the_diagonal() -> None:
    gradients = torch.tensor([[[4.0, 4.0], [1.0, -1.0]], [[-2.0, 0.0], [3.0, 1.0]]])
    grams, sq_norms = gradients @ gradients.mT, gradients.square().sum(-1)
    equal(metrics.tracin(sq_norms, 0.1), metrics.tracin(grams, 0.1).diagonal().tolist())


def test_nan_is_never_dropped() -> None:
    dots = torch.tensor([1.0, torch.nan])
    assert metrics.loss_change(dots, 0.1).isnan().tolist() == [False, True]
    assert metrics.tracin(dots[None], 0.1).isnan().tolist() == [False, True]


def test_empty_batches_give_empty_results() -> None:
    assert metrics.loss_change(torch.empty(0), 0.1).shape == (0,)
    assert metrics.tracin(torch.empty(2, 0, 3), 0.1).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    values = DOTS.to(dtype)
    assert metrics.loss_change(values, 0.1).dtype == torch.float32
    assert metrics.tracin(values[None], torch.tensor([0.1])).dtype == torch.float32


BAD_VALUES = {
    "tracin_empty": (lambda: metrics.tracin([], 0.1), r"one entry per checkpoint"),
    "tracin_rates": (
        lambda: metrics.tracin(DOTS[None], [0.1, 0.2]),
        r"got shapes \[1, 3\] and \[2\]",
    ),
}

BAD_TYPES = {
    "tracin_dtype": (lambda: metrics.tracin(DOTS.long(), 0.1), r"got torch\.int64"),
    "loss_change": (lambda: metrics.loss_change(DOTS.long(), 0.1), r"torch\.int64"),
}

test_values_say_what_to_do = raising(ValueError, BAD_VALUES)
test_types_say_what_to_do = raising(TypeError, BAD_TYPES)
