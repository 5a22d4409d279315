"""What is read from a course of coherence, against what anyone would do by hand."""

import itertools
import math
import random

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence.studies import courses


def course(values, steps=None, train=None):
    steps, train = steps or range(len(values)), train or [0.0] * len(values)
    return [
        {"step": s, "whole": m, "whole low": m - 1, "train": t}
        for s, m, t in zip(steps, values, train, strict=True)
    ]


def test_the_largest_rise_of_all_pairs():
    generator = random.Random(0)
    for _ in range(200):
        values = [generator.randint(0, 9) for _ in range(generator.randint(1, 7))]
        low, high = courses.rise(course(values))
        pairs = itertools.combinations_with_replacement(range(len(values)), 2)
        assert low <= high
        assert values[high] - values[low] == max(values[j] - values[i] for i, j in pairs)
        assert courses.peak(course(values))["whole"] == values[high]


def test_what_only_falls_has_no_rise():
    assert courses.rise(course([9.0, 5.0, 1.0])) == (0, 0)


def test_where_m_cannot_be_told_from_1():
    run = course([5.0, 1.5, 4.0, 2.0, 0.3])
    assert [courses.flat(run, after)["step"] for after in range(5)] == [1, 1, 3, 3, 4]
    assert courses.flat(course([5.0, 4.0]))["step"] == 1  # the last


def test_means_are_over_steps():
    run = course([6.0, 2.0, 4.0], steps=[0, 1, 5], train=[0.0, 0.4, 0.6])
    assert courses.each_step(run).tolist() == [6, 2, 2.5, 3, 3.5, 4]
    assert courses.until(run, 0.5) == pytest.approx(21 / 6)
    assert courses.until(run, 0.3) == pytest.approx(4)
    assert courses.until(run, 0.9) == pytest.approx(21 / 6)  # never: all


def test_the_sum_of_the_bound():
    run = course([6.0, 2.0, 4.0], steps=[0, 1, 4], train=[0.0, 1.0, 1.0])
    alphas = [(m - 1) / 10 for m in (6.0, 2.0, 2 + 2 / 3, 2 + 4 / 3)]
    terms = [0.5 / 8 * math.sqrt(2 * (1 - alpha)) for alpha in alphas]
    assert courses.bound_sum(run, 11, 8, 0.5) == pytest.approx(sum(terms))
    assert courses.bound_sum(run, 11, 8, 0.5, 1.0) == pytest.approx(terms[0])
