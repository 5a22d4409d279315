"""Coherence of networks and layers against gradients taken one by one."""

import copy

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence import metrics
from pycoherence.studies import coherences
from pycoherence.studies.data import load
from pycoherence.studies.models import CNN, MLP, ResNet

DATA = load().first(23)


def network(kind):
    torch.manual_seed(0)
    return kind.build(DATA).double()


@pytest.fixture
def sample():
    data = copy.copy(DATA)
    object.__setattr__(data, "images", data.images.double())
    return data


def gradients(model, sample, batches):
    """Of the mean loss of each batch, for the whole network and its layers: [n, P]."""
    rows = []
    for batch in batches:
        loss = torch.nn.functional.cross_entropy(model(sample.images[batch]), sample.labels[batch])
        rows.append(torch.autograd.grad(loss, [*model.parameters()]))
    names = [name for name, _ in model.named_parameters()]
    of = {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(names)}
    parts = {part: of[name] for part, name in coherences.layers(model).items()}
    return {"whole": torch.cat([*of.values()], dim=1), **parts}


def m(rows):
    return (rows.sum(0).square().sum() / rows.square().sum()).item()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MLP((9, 8)), ["hidden1", "hidden2", "output"]),
        (CNN((4,)), ["conv1", "conv1", "output"]),
        (ResNet((4, 8)), ["conv", "block2.conv1", "output"]),
    ],
)
def test_layers_are_the_first_a_middle_and_the_last(kind, expected):
    assert [*coherences.layers(kind.build(DATA)).values()] == [
        f"{name}.weight" for name in expected
    ]


def test_of_examples(sample):
    model = network(ResNet((4, 8)))
    slow = gradients(model, sample, [[i] for i in range(23)])
    sums = coherences.example_sums(model, sample)
    assert all(p.grad is None for p in model.parameters())
    found = coherences.of_examples(sums)
    for part, rows in slow.items():
        torch.testing.assert_close(sums[part][0], rows @ rows.mean(0))
        torch.testing.assert_close(sums[part][1], rows.square().sum(1))
        assert found[part] == pytest.approx(m(rows))
        assert found[f"{part} low"] < found[part] < found[f"{part} high"]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_of_batches_leaves_the_model_as_it_is(sample, norm):
    model = network(ResNet((4, 8), norm)).eval()
    before = copy.deepcopy(model.state_dict())
    grams = coherences.batch_grams(model, sample, 5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    batches = torch.arange(20).view(4, 5)
    slow = gradients(copy.deepcopy(model).train(), sample, batches)
    found = coherences.of_batches(grams, 5, 23)
    for part, rows in slow.items():
        torch.testing.assert_close(grams[part], rows @ rows.T)
        alpha = metrics.example_alpha((m(rows) - 1) / 3, 5)
        assert found[part] == pytest.approx(1 + 22 * alpha)
        assert found[f"{part} low"] < found[part] <= found[f"{part} high"]


def test_batches_tell_the_coherence_of_examples(sample):
    """Over many partitions, exactly: numerator and denominator are means of the same products."""
    model = network(MLP((6,)))
    (dots, sq_norms), total = coherences.example_sums(model, sample)["whole"], torch.zeros(2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        order = torch.randperm(23, generator=generator)
        shuffled = copy.copy(sample)
        object.__setattr__(shuffled, "images", sample.images[order])
        object.__setattr__(shuffled, "labels", sample.labels[order])
        gram = coherences.batch_grams(model, shuffled, 5)["whole"]
        total += torch.stack([gram.sum(), gram.trace()])
    of_batches = metrics.unbiased_alpha(*total.tolist(), n=4)
    s, q = 23 * dots.sum(), sq_norms.sum()
    expected = metrics.unbiased_alpha(s, q, 23).item()
    assert metrics.example_alpha(of_batches, 5) == pytest.approx(expected, rel=0.1, abs=0.005)


def test_of_subsamples(sample):
    model = network(MLP((6,)))
    sums = coherences.example_sums(model, sample)["whole"]
    gram = coherences.batch_grams(model, sample, 5)["whole"]
    rows = gradients(model, sample, [[i] for i in range(23)])["whole"]
    for batches in (1, 2, 3, 4):
        n = 5 * batches
        parts = [rows[i : i + n] for i in range(0, 20 - n + 1, n)]
        assert len(parts) == 4 // batches
        values = [m(part) for part in parts]
        found = coherences.of_subsamples(sums, gram, 5, batches)
        assert found[f"plain {n}"] == pytest.approx(sum(values) / len(parts) / n)
        free = [(value - 1) / (n - 1) for value in values]
        assert found[f"free {n}"] == pytest.approx(sum(free) / len(parts))
