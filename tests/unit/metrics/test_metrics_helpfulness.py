"""What examples and groups of them add to a step."""

import pytest
import torch
from support.angles import equal
from support.raising import raising
from torch import Tensor

from pycoherence import metrics

# One example with the mean (1, 1) and twice its length, one orthogonal to the mean, one against it.
GRADIENTS = torch.tensor([[4.0, 4.0], [1.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
DOTS = torch.tensor([8.0, 0.0, -2.0], dtype=torch.float64)
SQ_NORMS = torch.tensor([32.0, 2.0, 4.0], dtype=torch.float64)


def test_the_numbers_of_this_file_are_those_of_its_gradients() -> None:
    equal(GRADIENTS @ GRADIENTS.mean(0), DOTS.tolist())
    equal(GRADIENTS.square().sum(1), SQ_NORMS.tolist())


def test_helpfulness_by_hand() -> None:
    equal(metrics.helpfulness(DOTS, SQ_NORMS), [0.75, 0.0, -1.5])


def test_helpfulness_of_the_toy_problem_is_its_m_coherence(toy: Tensor) -> None:
    equal(metrics.helpfulness(toy @ toy.mean(0), toy.square().sum(1)), [2.5] * 4)


@pytest.mark.parametrize("norms", [[1.0, 1.0, 1.0], [1e-3, 2.0, 700.0]])
def test_orthogonal_examples_help_themselves_alone(norms: list[float]) -> None:
    gradients = torch.tensor(norms, dtype=torch.float64).diag()
    result = metrics.helpfulness(gradients @ gradients.mean(0), gradients.square().sum(1))
    equal(result, [1.0, 1.0, 1.0])


def test_equal_examples_help_all() -> None:
    equal(metrics.helpfulness(torch.full((5,), 3.0), torch.full((5,), 3.0)), [5.0] * 5)


def test_helpfulness_of_a_vanished_gradient_is_nan_and_of_no_other() -> None:
    equal(metrics.helpfulness(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0])), [torch.nan, 1.0])


def test_shares_by_hand() -> None:
    equal(metrics.share(DOTS), [8 / 6, 0.0, -2 / 6])
    equal(metrics.share(3 * DOTS), [8 / 6, 0.0, -2 / 6])


def test_shares_of_the_toy_problem_are_equal(toy: Tensor) -> None:
    equal(metrics.share(toy @ toy.mean(0)), [0.25] * 4)


def test_group_shares_by_hand() -> None:
    equal(metrics.group_share(DOTS, torch.tensor([1, 0, 1])), [0.0, 1.0])
    equal(metrics.group_share(DOTS, torch.tensor([0, 0, 2])), [8 / 6, 0.0, -2 / 6])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_a_mask_makes_two_groups(dtype: torch.dtype) -> None:
    pristine = torch.tensor([True, True, False])
    equal(metrics.group_share(DOTS, pristine), [-2 / 6, 8 / 6])
    equal(metrics.group_share(DOTS, pristine.to(dtype)), [-2 / 6, 8 / 6])
    equal(metrics.group_share(DOTS, torch.ones(3, dtype=torch.bool)), [0.0, 1.0])


def test_more_groups_than_a_narrow_type_can_count() -> None:
    shares = metrics.group_share(DOTS, torch.tensor([0, 255, 0], dtype=torch.uint8), 300)
    assert shares.shape == (300,)
    assert shares[0] == 1.0


def test_groups_without_members_have_no_share() -> None:
    equal(metrics.group_share(DOTS, torch.tensor([1, 1, 1]), 4), [0.0, 1.0, 0.0, 0.0])


def test_group_shares_are_those_of_group_gradients(toy: Tensor) -> None:
    corrupt = torch.tensor([False, True, False, False])
    total, own = toy.sum(0), toy[corrupt].sum(0)
    shares = metrics.group_share(toy @ toy.mean(0), corrupt)
    equal(shares, [1 - (own @ total / (total @ total)).item(), 0.25])


def test_layers_and_steps_go_in_front() -> None:
    dots, sq_norms = torch.stack([DOTS, 2 * DOTS + 1]), torch.stack([SQ_NORMS, SQ_NORMS])
    groups = torch.tensor([0, 1, 0])
    for layer in range(2):
        one, norms = dots[layer], sq_norms[layer]
        equal(metrics.helpfulness(dots, sq_norms)[layer], metrics.helpfulness(one, norms).tolist())
        equal(metrics.share(dots)[layer], metrics.share(one).tolist())
        equal(metrics.group_share(dots, groups)[layer], metrics.group_share(one, groups).tolist())


def test_gradients_that_cancel_have_no_shares() -> None:
    zeros = torch.zeros(3)
    assert metrics.share(zeros).isnan().all()
    assert metrics.group_share(zeros, torch.tensor([0, 1, 1])).isnan().all()


def test_nan_is_never_dropped() -> None:
    dots = torch.tensor([1.0, torch.nan])
    assert metrics.helpfulness(dots, torch.ones(2)).isnan().tolist() == [False, True]
    assert metrics.share(dots).isnan().all()
    assert metrics.group_share(dots, torch.tensor([0, 1])).isnan().all()


def test_empty_and_single_examples() -> None:
    empty, nobody = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert metrics.helpfulness(empty, empty).shape == (0,)
    assert metrics.share(empty).shape == (0,)
    assert metrics.group_share(empty, nobody).shape == (0,)
    assert metrics.group_share(empty, nobody, 2).isnan().tolist() == [True, True]
    equal(metrics.helpfulness(torch.tensor([4.0]), torch.tensor([4.0])), [1.0])
    equal(metrics.share(torch.tensor([4.0])), [1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    values = torch.tensor([4.0, 9.0], dtype=dtype)
    assert metrics.helpfulness(values, values).dtype == torch.float32
    assert metrics.share(values).dtype == torch.float32
    assert metrics.group_share(values, torch.tensor([0, 1])).dtype == torch.float32


BAD_VALUES = {
    "dots_number": (
        lambda: metrics.share(1.0),  # pyright: ignore
        r"dots \[\.\.\., n\]",
    ),
    "helpfulness_number": (
        lambda: metrics.helpfulness(1.0, 1.0),  # pyright: ignore
        r"dots \[\.\.\., n\]",
    ),
    "helpfulness_shapes": (
        lambda: metrics.helpfulness(DOTS, SQ_NORMS[:2]),
        r"one shape, got .*\[3\].*\[2\]",
    ),
    "groups_shape": (
        lambda: metrics.group_share(DOTS, torch.tensor([0, 1])),
        r"groups \[3\], got shape \[2\]",
    ),
    "groups_negative": (
        lambda: metrics.group_share(DOTS, torch.tensor([0, -1, 1])),
        r"groups in \[0, 2\), got values from -1 to 1; number them from 0",
    ),
    "groups_all_negative": (
        lambda: metrics.group_share(DOTS, torch.tensor([-9, -9, -9])),
        r"groups in \[0, 0\), got values from -9 to -9",
    ),
    "groups_high": (
        lambda: metrics.group_share(DOTS, torch.tensor([0, 1, 2]), 2),
        r"groups in \[0, 2\), got values from 0 to 2",
    ),
    "groups_count": (
        lambda: metrics.group_share(DOTS, torch.tensor([0, 1, 2]), -1),
        r"num_groups >= 0, got -1",
    ),
}

BAD_TYPES = {
    "helpfulness_dtype": (
        lambda: metrics.helpfulness(DOTS.long(), SQ_NORMS),
        r"dots to be a floating-point tensor, got torch\.int64",
    ),
    "groups_dtype": (
        lambda: metrics.group_share(DOTS, torch.zeros(3)),
        r"groups to be an integer tensor, got torch\.float32",
    ),
    "groups_list": (
        lambda: metrics.group_share(DOTS, [0, 1, 1]),  # pyright: ignore
        r"groups to be an integer tensor, got list",
    ),
    "groups_device": (
        lambda: metrics.group_share(DOTS, torch.zeros(3, dtype=torch.int64, device="meta")),
        r"groups on cpu, got meta",
    ),
}

test_values_say_what_to_do = raising(ValueError, BAD_VALUES)
test_types_say_what_to_do = raising(TypeError, BAD_TYPES)
