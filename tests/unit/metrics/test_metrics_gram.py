"""Statistics of all pairs on gradients whose angles are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.angles import GRADIENTS, GRAM, HALF, equal
from support.raising import raising
from torch import Tensor

from pycoherence import metrics

NAN = torch.nan


def test_cosines_by_hand() -> None:
    equal(
        metrics.cosines(GRAM),
        [[1.0, 0.0, -1.0, HALF], [0.0, 1.0, 0.0, HALF], [-1, 0, 1, -HALF], [HALF, HALF, -HALF, 1]],
    )


def test_cosines_of_two_samples() -> None:
    sq_norms = GRAM.diagonal()
    cross = metrics.cosines(GRAM[:1, 1:], (sq_norms[:1], sq_norms[1:]))
    equal(cross, [[0.0, -1.0, HALF]])


def test_stiffness_by_hand() -> None:
    equal(metrics.stiffness(GRAM), (-1 + HALF) / 6)
    equal(metrics.stiffness(GRAM, "sign"), (-1 + 1 + 1 - 1) / 6)


def test_confusion_by_hand() -> None:
    equal(metrics.confusion(GRAM), 1.0)
    equal(metrics.confusion(GRAM, "dot"), 2.0)
    equal(metrics.confusion(GRAM[1:, 1:]), HALF)
    equal(metrics.confusion(GRAM[1:, 1:], "dot"), 1.0)


def test_disparity_by_hand() -> None:
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    equal(metrics.disparity(triangle @ triangle.T), (3 + 4 + 5) / 3)


def test_the_toy_problem(toy: Tensor) -> None:
    gram = toy @ toy.T
    sums = metrics.gram_sums(gram)
    assert [each.item() for each in sums] == [20.0, 8.0]
    assert metrics.m_coherence(*sums) == 2.5
    assert metrics.alpha(*sums, n=4) == 0.625
    equal(metrics.stiffness(gram), 0.5)
    equal(metrics.stiffness(gram, "sign"), 1.0)
    equal(metrics.confusion(gram), -0.5)
    equal(metrics.disparity(gram), 2**0.5)


def test_orthogonal_gradients() -> None:
    gram = torch.tensor([1e-3, 2.0, 700.0]).square().diag()
    equal(metrics.stiffness(gram), 0.0)
    equal(metrics.stiffness(gram, "sign"), 0.0)
    equal(metrics.confusion(gram), 0.0)


def test_equal_gradients() -> None:
    gram = torch.full((5, 5), 9.0)
    equal(metrics.stiffness(gram), 1.0)
    equal(metrics.confusion(gram, "dot"), -9.0)
    equal(metrics.disparity(gram), 0.0)


def test_disparity_of_nearly_equal_gradients_is_no_root_of_a_negative_number() -> None:
    gram = torch.tensor([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]])
    equal(metrics.disparity(gram), 0.0)


def test_a_vanished_gradient_makes_its_cosines_nan_and_its_signs_zero() -> None:
    gradients = torch.cat([GRADIENTS, torch.zeros(1, 2, dtype=torch.float64)])
    gram = gradients @ gradients.T
    cosines = metrics.cosines(gram)
    assert cosines[4].isnan().all()
    assert cosines[:, 4].isnan().all()
    equal(cosines[:4, :4], metrics.cosines(GRAM).tolist())
    assert metrics.stiffness(gram).isnan()
    assert metrics.confusion(gram).isnan()
    equal(metrics.stiffness(gram, "sign"), 0.0)
    equal(metrics.confusion(gram, "dot"), 2.0)


def test_nan_is_never_dropped() -> None:
    gram = GRAM.clone()
    gram[3, :] = gram[:, 3] = NAN
    values = [metrics.stiffness(gram), metrics.stiffness(gram, "sign"), metrics.confusion(gram)]
    values += [metrics.confusion(gram, "dot"), metrics.disparity(gram), *metrics.gram_sums(gram)]
    assert all(value.isnan() for value in values)


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_pair_there_is_no_answer(n: int) -> None:
    gram = torch.ones(n, n)
    values = [metrics.stiffness(gram), metrics.stiffness(gram, "sign"), metrics.confusion(gram)]
    values += [metrics.confusion(gram, "dot"), metrics.disparity(gram)]
    assert all(value.isnan() for value in values)
    assert metrics.cosines(gram).shape == (n, n)
    assert [each.item() for each in metrics.gram_sums(gram)] == [n, n]


def test_arguments_are_left_alone() -> None:
    gram = GRAM.clone()
    for kind in ("cos", "sign"):
        metrics.stiffness(gram, kind)
        metrics.class_stiffness(gram, torch.tensor([0, 0, 1, 1]), kind)
    metrics.confusion(gram, "dot")
    metrics.disparity(gram)
    assert torch.equal(gram, GRAM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    gram = GRAM.to(dtype)
    values = [metrics.cosines(gram), metrics.stiffness(gram), metrics.confusion(gram, "dot")]
    values += [*metrics.gram_sums(gram), metrics.disparity(gram)]
    values += metrics.class_stiffness(gram, torch.tensor([0, 0, 1, 1]))
    assert {value.dtype for value in values} == {torch.float32}


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "gram_sums": metrics.gram_sums,
    "cosines": metrics.cosines,
    "stiffness": metrics.stiffness,
    "confusion": metrics.confusion,
    "disparity": metrics.disparity,
    "class_stiffness": lambda gram: metrics.class_stiffness(gram, torch.tensor([0, 0, 1, 1])),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@every_function
@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 2, 2)])
def test_gram_must_be_square(function: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gram \[B, B\], got shape \[2.*; pass the dot products"):
        function(torch.ones(shape))


@every_function
def test_gram_must_be_floating_point(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"gram to be a floating-point tensor, got torch\.int64"):
        function(GRAM.long())


BAD_VALUES = {
    "stiffness": (
        lambda: metrics.stiffness(GRAM, "dot"),  # pyright: ignore
        r"\('cos', 'sign'\)",
    ),
    "confusion": (
        lambda: metrics.confusion(GRAM, "sign"),  # pyright: ignore
        r"got 'sign'",
    ),
    "sq_norms": (
        lambda: metrics.cosines(GRAM[:1], (torch.ones(4), torch.ones(1))),
        r"got shapes \[\[1, 4\], \[4\], \[1\]\]; pass the squared norms",
    ),
}

BAD_TYPES = {
    "sq_norms_dtype": (
        lambda: metrics.cosines(GRAM, (torch.ones(4), torch.arange(4))),
        r"sq_norms to be a floating-point tensor, got torch\.int64",
    ),
    "sq_norms_device": (
        lambda: metrics.cosines(GRAM, (torch.ones(4), torch.ones(4, device="meta"))),
        r"one device, got \['cpu', 'meta'\]",
    ),
}

test_values_say_what_to_do = raising(ValueError, BAD_VALUES)
test_types_say_what_to_do = raising(TypeError, BAD_TYPES)
