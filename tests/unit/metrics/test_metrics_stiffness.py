"""Stiffness by class, on gradients whose angles are known."""

from typing import Any

import pytest
import torch
from support.angles import GRAM, HALF, equal
from support.raising import raising

from pycoherence import metrics

NAN = torch.nan
CLASSES = torch.tensor([0, 0, 1, 1])


def test_class_stiffness_by_hand() -> None:
    matrix, within, between = metrics.class_stiffness(GRAM, CLASSES)
    across = (-1 + HALF + 0 + HALF) / 4
    equal(matrix, [[0.0, across], [across, -HALF]])
    equal(within, -HALF / 2)
    equal(between, across)


def test_class_stiffness_of_signs_by_hand() -> None:
    signs = metrics.class_stiffness(GRAM, CLASSES, "sign")
    equal(signs.matrix, [[0.0, 0.25], [0.25, -1.0]])
    equal(signs.within, -0.5)
    equal(signs.between, 0.25)


def test_one_class_is_plain_stiffness() -> None:
    one = metrics.class_stiffness(GRAM, torch.zeros(4, dtype=torch.int64))
    equal(one.matrix, [[metrics.stiffness(GRAM).item()]])
    equal(one.within, metrics.stiffness(GRAM).item())
    assert one.between.isnan()


def test_a_mask_makes_two_classes() -> None:
    mask = metrics.class_stiffness(GRAM, CLASSES.bool())
    equal(mask.matrix, metrics.class_stiffness(GRAM, CLASSES).matrix.tolist())


def test_classes_without_pairs_are_left_out_of_the_means() -> None:
    classes = torch.tensor([3, 1, 1, 1])
    matrix, within, between = metrics.class_stiffness(GRAM, classes, num_classes=5)
    own, across = (HALF - HALF) / 3, (0 - 1 + HALF) / 3
    expected = [[NAN] * 5 for _ in range(5)]
    expected[1][1], expected[1][3], expected[3][1] = own, across, across
    equal(matrix, expected)
    equal(within, own)
    equal(between, across)


def test_classes_of_single_examples_have_no_stiffness_within() -> None:
    result = metrics.class_stiffness(GRAM, torch.arange(4))
    assert result.within.isnan()
    equal(result.between, metrics.stiffness(GRAM).item())


@pytest.mark.parametrize("kind", ["cos", "sign"])
def test_nan_stays_in_its_class(kind: Any) -> None:
    gram = GRAM.clone()
    gram[3, :] = gram[:, 3] = NAN
    matrix, within, between = metrics.class_stiffness(gram, torch.tensor([0, 0, 1, 2]), kind)
    assert matrix.isnan().tolist() == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]
    assert not within.isnan()  # the classes of one example have no pairs and do not count
    assert between.isnan()


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_pair_there_is_no_answer(n: int) -> None:
    classes = torch.zeros(n, dtype=torch.int64)
    matrix, within, between = metrics.class_stiffness(torch.ones(n, n), classes)
    assert matrix.shape == (n, n)
    assert matrix.isnan().all()
    assert within.isnan()
    assert between.isnan()


BAD = {
    "classes": (
        lambda: metrics.class_stiffness(GRAM, CLASSES, num_classes=1),
        r"classes in \[0, 1\), got values from 0 to 1",
    ),
    "num_classes": (
        lambda: metrics.class_stiffness(GRAM, CLASSES, num_classes=-1),
        r"num_classes >= 0, got -1",
    ),
    "classes_shape": (
        lambda: metrics.class_stiffness(GRAM, CLASSES[:3]),
        r"classes \[4\], got shape \[3\]",
    ),
    "kind": (
        lambda: metrics.class_stiffness(GRAM, CLASSES, "dot"),  # pyright: ignore
        r"one of \('cos', 'sign'\), got 'dot'",
    ),
}

test_bad_values_say_what_to_do = raising(ValueError, BAD)


@pytest.mark.parametrize("classes", [CLASSES.double(), CLASSES.tolist(), CLASSES.to("meta")])
def test_classes_of_other_types_are_refused(classes: Any) -> None:
    with pytest.raises(TypeError, match=r"classes (to be an integer tensor|on cpu), got "):
        metrics.class_stiffness(GRAM, classes)
