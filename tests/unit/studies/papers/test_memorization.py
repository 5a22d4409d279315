"""Badger 2022: what is measured, and what the command finds at a rough look."""

import pytest
import torch
from support.oracle import m_coherence, per_example_gradients

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence.studies import gradients
from pycoherence.studies.data import load
from pycoherence.studies.models import MLP
from pycoherence.studies.papers import memorization


def cells(row):
    return [float(cell.rstrip("%")) for cell in row[1:]]


@pytest.mark.slow
def test_what_is_attacked_is_unlearned_and_comes_back(quick):
    shares = {row[0]: cells(row) for row in quick.rows("network and training")}
    train, attacked, held_out = shares["CNN, splitting"]
    assert train > 60
    assert attacked < 25
    assert held_out < shares["CNN, ordinary"][2] - 5
    for ordinary in (shares["CNN, ordinary"], shares["CNN, splitting, then ordinary"]):
        assert min(ordinary) > 75
    before, after = (
        next(run for run in quick.results["runs"] if run["name"] == f"{way}-CNN-seed0")["measured"]
        for way in ("splitting", "recovery")
    )
    switch = before[-1]["step"] // 2
    early = [[at for at in run if at["step"] <= switch] for run in (before, after)]
    assert early[0] == early[1]  # the same until it is switched


@pytest.mark.slow
def test_noise_leaves_nothing_to_hold_out(quick):
    shares = {row[0]: cells(row) for row in quick.rows("training, noise")}
    for way in ("splitting", "ordinary"):
        train, attacked, held_out = shares[f"{way}, 100%"]
        assert train > max(attacked, held_out) + 5
        assert held_out < 25
    assert shares["splitting, 100%"][1] < 10


def test_noise_is_blended_into_training_and_test_images():
    data = load().first(30)
    half, all_noise = (memorization.blended(data, noise, 1) for noise in (0.5, 1.0))
    assert torch.equal(memorization.blended(data, 0.0, 1).images, data.images)
    for name in ("images", "test_images"):
        old, mixed, drawn = (getattr(each, name) for each in (data, half, all_noise))
        torch.testing.assert_close(mixed, (old + drawn) / 2)
        both = torch.stack([old.flatten(), drawn.flatten()])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 0.15
    assert not torch.equal(all_noise.images, all_noise.test_images[:30])
    assert half.labels is data.labels


def test_measures_are_those_of_single_examples():
    """Input gradients and m-coherence against autograd, one example at a time."""
    data = load().first(20)
    torch.manual_seed(2)
    model = MLP((9,)).build(data)
    found = memorization.measure(model, data)
    assert all(p.grad is None for p in model.parameters())
    train = list(zip(data.images, data.labels, strict=True))
    attacked = list(zip(*gradients.attacked(data), strict=True))
    for key, examples in (("m_train", train), ("m_both", train[:10] + attacked[:10])):
        batch = tuple(map(torch.stack, zip(*examples, strict=True)))
        each = per_example_gradients(model, gradients.loss, batch)
        assert found[key] == pytest.approx(m_coherence(each), rel=1e-5)
    norms = []
    for x, y in train:
        image = x[None].clone().requires_grad_()
        [gradient] = torch.autograd.grad(gradients.loss(model, (image, y[None])), image)
        norms.append(gradient.norm().item())
    assert found["gradient_train"] == pytest.approx(sum(norms) / 20, rel=1e-5)
    right = [model(x[None]).argmax().item() == y for x, y in attacked]
    assert found["attacked"] == pytest.approx(sum(right) / len(right))
