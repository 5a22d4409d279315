"""Metrics of examples, pairs and coordinates against slow loops over explicit gradients."""

import math
from itertools import product
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.angles import equal, gradient_lists
from torch import Tensor

from pycoherence import metrics


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def ratio(a: float, b: float) -> float:
    return a / b if b else a * math.inf


def mean(values: list[float]) -> float:
    return ratio(sum(values), len(values))


def sign(value: float) -> float:
    return float((value > 0) - (value < 0))


def cosine(a: Tensor, b: Tensor) -> float:
    return ratio(dot(a, b), math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))


def close(result: Tensor, expected: Any) -> None:
    assert result.dtype == torch.float64
    equal(result, expected, 1e-9)


@given(gradient_lists())
def test_helpfulness(g: Tensor) -> None:
    result = metrics.helpfulness(g @ g.mean(0), g.square().sum(1))
    close(result, [ratio(sum(dot(a, b) for b in g), dot(a, a)) for a in g])


@given(gradient_lists())
def test_helpfulness_averages_to_m_coherence(g: Tensor) -> None:
    assume(g.any(dim=1).all())
    sq_norms = g.square().sum(1)
    helped = metrics.combine(metrics.helpfulness(g @ g.mean(0), sq_norms), sq_norms)
    close(helped, metrics.m_coherence(*metrics.gram_sums(g @ g.T)).item())


@given(gradient_lists(), st.data())
def test_shares(g: Tensor, data: st.DataObject) -> None:
    total = g.sum(0)
    assume(total.any())
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(g), max_size=len(g)))
    dots = g @ g.mean(0)
    close(metrics.share(dots), [dot(a, total) / dot(total, total) for a in g])
    expected = [
        sum(dot(a, total) for a, group in zip(g, groups, strict=True) if group == k)
        / dot(total, total)
        for k in range(4)
    ]
    result = metrics.group_share(dots, torch.tensor(groups), num_groups=4)
    close(result, expected)
    close(result.sum(), 1.0)


@given(gradient_lists())
def test_sums_of_the_gram_matrix(g: Tensor) -> None:
    total = g.sum(0)
    s, q = metrics.gram_sums(g @ g.T)
    close(s, dot(total, total))
    close(q, sum(dot(a, a) for a in g))


@given(gradient_lists(), gradient_lists())
def test_cosines(g: Tensor, h: Tensor) -> None:
    expected = [[cosine(a, b) for b in g] for a in g]
    close(metrics.cosines(g @ g.T), expected)
    width = min(g.shape[1], h.shape[1])
    g, h = g[:, :width], h[:, :width]
    result = metrics.cosines(g @ h.T, (g.square().sum(1), h.square().sum(1)))
    close(result, [[cosine(a, b) for b in h] for a in g])
    assert not (result.abs() > 1 + 1e-12).any()


@given(gradient_lists())
def test_statistics_of_pairs(g: Tensor) -> None:
    gram = g @ g.T
    pairs = [(a, b) for (i, a), (j, b) in product(enumerate(g), repeat=2) if i != j]
    dots, cosines = [dot(a, b) for a, b in pairs], [cosine(a, b) for a, b in pairs]
    close(metrics.stiffness(gram), mean(cosines))
    close(metrics.stiffness(gram, "sign"), mean([sign(each) for each in dots]))
    close(metrics.disparity(gram), mean([math.dist(a.tolist(), b.tolist()) for a, b in pairs]))
    close(metrics.confusion(gram, "dot"), -min(dots, default=math.nan))
    undefined = not pairs or any(math.isnan(each) for each in cosines)
    close(metrics.confusion(gram), math.nan if undefined else -min(cosines))


@given(gradient_lists(), st.sampled_from(["cos", "sign"]), st.data())
def test_stiffness_of_classes(g: Tensor, kind: Literal["cos", "sign"], data: st.DataObject) -> None:
    classes = data.draw(st.lists(st.integers(0, 2), min_size=len(g), max_size=len(g)))
    expected = [[[] for _ in range(3)] for _ in range(3)]
    for (i, a), (j, b) in product(enumerate(g), repeat=2):
        if i != j:
            value = cosine(a, b) if kind == "cos" else sign(dot(a, b))
            expected[classes[i]][classes[j]].append(value)
    result = metrics.class_stiffness(g @ g.T, torch.tensor(classes), kind, num_classes=3)
    close(result.matrix, [[mean(values) for values in row] for row in expected])
    filled = [
        (a, b, mean(expected[a][b])) for a, b in product(range(3), repeat=2) if expected[a][b]
    ]
    close(result.within, mean([value for a, b, value in filled if a == b]))
    close(result.between, mean([value for a, b, value in filled if a != b]))


@given(gradient_lists(min_n=2), st.permutations(range(4)))
def test_order_of_examples_is_nothing_to_pairs(g: Tensor, order: list[int]) -> None:
    order = [i for i in order if i < len(g)] + list(range(4, len(g)))
    gram, shuffled = g @ g.T, g[order] @ g[order].T
    for metric in (metrics.stiffness, metrics.confusion, metrics.disparity):
        close(metric(shuffled), metric(gram).item())


@given(gradient_lists(min_n=2), st.floats(1e-3, 1e3))
def test_scale_of_the_gradients(g: Tensor, scale: float) -> None:
    gram = g @ g.T
    scaled = scale**2 * gram
    close(metrics.stiffness(scaled), metrics.stiffness(gram).item())
    close(metrics.confusion(scaled), metrics.confusion(gram).item())
    close(metrics.disparity(scaled) / scale, metrics.disparity(gram).item())
    dots, sq_norms = g @ g.mean(0), g.square().sum(1)
    close(
        metrics.helpfulness(scale**2 * dots, scale**2 * sq_norms),
        metrics.helpfulness(dots, sq_norms).tolist(),
    )


@given(gradient_lists(min_n=2))
def test_ranges(g: Tensor) -> None:
    gram = g @ g.T
    first, second = g.mean(0), g.square().mean(0)
    stiffness, confusion = metrics.stiffness(gram), metrics.confusion(gram)
    assert stiffness.isnan() or -1 / (len(g) - 1) - 1e-9 <= stiffness <= 1 + 1e-9
    assert confusion.isnan() or -1 - 1e-9 <= confusion <= 1 + 1e-9
    assert metrics.disparity(gram) >= 0
    alphas = metrics.coordinate_alpha(first, second)
    assert ((alphas >= 0) & (alphas <= 1 + 1e-9) | alphas.isnan()).all()
    gsnr = metrics.gsnr(first, second)
    assert ((gsnr >= 0) | gsnr.isnan()).all()


@given(gradient_lists())
def test_moments(g: Tensor) -> None:
    # The mean of integers is rounded, and so a variance of 0 need not come out as 0 exactly.
    first, second = g.mean(0), g.square().mean(0)
    for j, column in enumerate(g.T.tolist()):
        average = mean(column)
        variance = mean([(x - average) ** 2 for x in column])
        alpha = ratio(average**2, mean([x**2 for x in column]))
        close(metrics.coordinate_alpha(first, second)[j], alpha)
        if variance > 0:
            close(metrics.gsnr(first, second)[j], average**2 / variance)
        elif average:
            assert metrics.gsnr(first, second)[j] > 1e12


@given(gradient_lists(), st.integers(1, 100))
def test_osgr_is_the_sum_of_the_source(g: Tensor, n: int) -> None:
    first, second = g.mean(0), g.square().mean(0)
    assume(g.any() and (g != g[0]).any(dim=0).all())  # the formula has no value where r is inf
    r, variance = metrics.gsnr(first, second), second - first**2
    weights = first**2 + variance / n
    by_formula = 1 - (weights / weights.sum() / (r + 1 / n)).sum() / n
    result = metrics.osgr(first, second, n)
    close(result, by_formula.item())
    assert -1e-9 <= result <= 1 + 1e-9


@given(gradient_lists(), st.integers(1, 100))
def test_osgr_is_the_alpha_of_minibatches(g: Tensor, n: int) -> None:
    alpha = metrics.alpha(*metrics.gram_sums(g @ g.T), n=len(g))
    osgr = metrics.osgr(g.mean(0), g.square().mean(0), n)
    close(osgr, metrics.minibatch_alpha(alpha, n).item())


@given(gradient_lists())
def test_coordinates_combine_to_the_whole(g: Tensor) -> None:
    first, second = g.mean(0), g.square().mean(0)
    whole = metrics.combine(metrics.coordinate_alpha(first, second), second)
    close(whole, metrics.alpha(*metrics.gram_sums(g @ g.T), n=len(g)).item())


@given(gradient_lists())
def test_signs(g: Tensor) -> None:
    sign_sum, n = g.sign().sum(0), len(g)
    for j, column in enumerate(g.T.tolist()):
        up, down = sum(x > 0 for x in column), sum(x < 0 for x in column)
        zero = n - up - down
        close(metrics.sign_agreement(sign_sum, n)[j], abs(up - down) / n)
        close(metrics.same_sign_share(sign_sum, n)[j], (max(up, down) + zero / 2) / n)
        close(metrics.sign_vote(sign_sum)[j], sign(up - down))


@given(st.integers(1, 3), gradient_lists(), st.data())
def test_tracin(steps: int, g: Tensor, data: st.DataObject) -> None:
    rates = data.draw(st.lists(st.floats(0, 1), min_size=steps, max_size=steps))
    checkpoints = [g + t for t in range(steps)]
    result = metrics.tracin([each @ each.T for each in checkpoints], rates)
    for i, j in product(range(len(g)), repeat=2):
        influence = sum(
            rate * dot(each[i], each[j]) for rate, each in zip(rates, checkpoints, strict=True)
        )
        assert result[i, j].item() == pytest.approx(influence)
