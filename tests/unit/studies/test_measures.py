"""What is read from the measurements of a training."""

import math

import pytest
import torch

pytest.importorskip("sklearn")

import pycoherence as pc
from pycoherence.studies import gradients, measures
from pycoherence.studies.data import load
from pycoherence.studies.models import MLP


def history(*rights):
    return [{"step": 3 * i, "right": right} for i, right in enumerate(rights)]


def test_marks_are_read_as_they_were():
    chosen = torch.tensor([True, False, False, True])
    assert measures.marks(chosen) == "1001"
    assert torch.equal(measures.marked("1001"), chosen)
    assert measures.marked("").shape == (0,)
    assert measures.marked("").dtype == torch.bool


def test_each_example_is_what_accuracies_count():
    data = load().first(50)
    data = data.labelled((data.truth + (torch.arange(50) % 3 == 0)) % 10)
    torch.manual_seed(0)
    model = MLP((7,)).build(data)
    found = measures.each_example(model, data)
    right = [model(data.images[i : i + 1]).argmax() == data.labels[i] for i in range(50)]
    assert [mark == "1" for mark in found.pop("right")] == right
    assert found == measures.accuracies(model, data)
    assert found["train"] == sum(right) / 50


def test_learning_times():
    run = history("0100", "0110", "1110", "0110", "1100")
    assert measures.learnt_first(run).tolist() == [6, 0, 3, math.inf]
    assert measures.learnt_last(run).tolist() == [12, 0, math.inf, math.inf]


@pytest.mark.parametrize("seed", range(3))
def test_learning_times_are_those_of_a_loop(seed):
    """One example and measurement after the other, forgetting what was learnt at each mistake."""
    torch.manual_seed(seed)
    run = history(*(measures.marks(torch.rand(40) < 0.7) for _ in range(7)))
    for i in range(40):
        first = last = math.inf
        for at in run:
            if at["right"][i] == "0":
                last = math.inf
            else:
                first, last = min(first, at["step"]), min(last, at["step"])
        assert measures.learnt_first(run)[i] == first
        assert measures.learnt_last(run)[i] == last


@pytest.mark.parametrize("values", [3, 1000])
def test_spearman_with_ties_and_infinity(values):
    """Against ranks by counting, which share the mean of their places."""
    torch.manual_seed(values)
    a, b = (torch.randint(values, (50,)).double() for _ in range(2))
    b += a
    a[a == a.max()] = math.inf
    ranks = [
        torch.tensor([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x], dtype=torch.float64)
        for x in (a, b)
    ]
    assert measures.spearman(a, b) == pytest.approx(torch.corrcoef(torch.stack(ranks))[0, 1].item())
    assert measures.spearman(a, a) == pytest.approx(1)
    assert measures.spearman(a, -a) == pytest.approx(-1)


def test_spearman_of_nothing_but_ties():
    assert math.isnan(measures.spearman(torch.ones(4), torch.arange(4)))


def test_coherence_is_that_of_single_gradients():
    data = load().first(6)
    torch.manual_seed(0)
    model = MLP((7,)).build(data)
    found = measures.coherence(model, data.images, data.labels)
    rows = []
    for i in range(6):
        loss = gradients.loss(model, (data.images[i : i + 1], data.labels[i : i + 1]))
        grads = torch.autograd.grad(loss, [*model.parameters()])
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    g = torch.stack(rows)
    assert found.m == pytest.approx((g.sum(0).square().sum() / g.square().sum()).item(), rel=1e-4)
    assert isinstance(found, pc.Coherence)
    assert all(p.grad is None for p in model.parameters())
