"""Training steps along the gradient it should, repeats itself, and goes on where it stopped."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from support.oracle import joined, per_example_gradients

pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

import pycoherence as pc
from pycoherence.studies import gradients, measures, runs
from pycoherence.studies.data import Data
from pycoherence.studies.models import CNN, MLP, ResNet, Softmax
from pycoherence.studies.runs import Run
from pycoherence.studies.trainer import Recipe, Training

GRADIENTS = {
    "mean": gradients.Mean(),
    "robust": gradients.Robust(pc.Winsorized(2)),
    "sign of sum": gradients.SignOfSum(),
    "sum of signs": gradients.SumOfSigns(),
}
NETWORKS = {
    "mlp": MLP((7,)),
    "dropout": MLP((7, 5), 0.5),
    "cnn": CNN((4, 8)),
    "cnn without pooling": CNN((4, 8, 4), pooled=False),
    "softmax": Softmax(MLP((7,))),
    "resnet": ResNet((8, 16)),
    "resnet with batch norm": ResNet((8, 16), norm="batch"),
}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(33, 1, 6, 6, generator=generator)
    labels = torch.randint(3, (33,), generator=generator)
    return Data("noise", images, labels, labels, images[:9], labels[:9], 3)


def accuracy(model, data):
    return {"train": measures.share(measures.correct(model, data.images, data.labels))}


def recipe(**settings):
    return Recipe(**{"network": MLP((7,)), "steps": 12, "lr": 0.1, "batch_size": 8, **settings})


def trained(training, steps):
    for _ in range(steps):
        training.advance()
    return training


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_are_what_they_say(kind, data):
    model = MLP((7,)).build(data).double()
    batch = data.images[:8].double(), data.labels[:8]
    each = joined(per_example_gradients(model, gradients.loss, batch))
    expected = {
        "mean": each.mean(0),
        "robust": each.clamp(*each.sort(0).values[[2, 5]]).mean(0),
        "sign of sum": each.sum(0).sign(),
        "sum of signs": each.sign().sum(0),
    }
    GRADIENTS[kind].fill(model, batch, data)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected[kind])


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_splitting_subtracts_the_gradient_of_attacked_examples(conditional, right, data):
    torch.manual_seed(4)
    model = MLP((7,)).build(data).double()
    images = data.test_images.double()
    guessed = model(images).argmax(dim=1)
    data = replace(data, test_images=images, test_labels=guessed if right else (guessed + 1) % 3)
    batch, parameters = (data.images[:3].double(), data.labels[:3]), [*model.parameters()]
    chosen = [0, 2, 4, 6, 8]  # of nine
    torch.manual_seed(6)
    chosen = [chosen[i] for i in torch.randperm(5).tolist()[:3]]
    expected = torch.autograd.grad(gradients.loss(model, batch), parameters)
    if right or not conditional:
        attacked = data.test_images[chosen], data.test_labels[chosen]
        other = torch.autograd.grad(gradients.loss(model, attacked), parameters)
        expected = [a - b for a, b in zip(expected, other, strict=True)]
    torch.manual_seed(6)
    gradients.Splitting(conditional).fill(model, batch, data)
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_no_test_example_is_attacked_and_held_out(data):
    labels = torch.arange(9)
    data = replace(data, test_labels=labels, test_images=labels.double().view(9, 1, 1, 1))
    halves = gradients.attacked(data), gradients.held_out(data)
    assert [half[1].tolist() for half in halves] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    for images, of in halves:
        assert torch.equal(images.flatten(), of.double())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (2, 1, 1)])
def test_a_cnn_without_pooling_takes_any_size(shape, data):
    images = torch.zeros(2, *shape)
    for channels in ((4,), (4, 4, 4)):
        model = CNN(channels, pooled=False).build(replace(data, images=images))
        assert model(images).shape == (2, 3)


def test_losses_after_a_softmax_are_bounded(data):
    model = Softmax(MLP(())).build(data)
    for p in model.parameters():
        p.data *= 1000
    losses = F.cross_entropy(model(data.images), data.labels, reduction="none")
    least = math.log(1 + 2 / math.e)
    assert losses.min().item() == pytest.approx(least, abs=1e-5)
    assert losses.max().item() == pytest.approx(least + 1, abs=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_and_mix_no_examples(name, data):
    network = NETWORKS[name]
    training = Training(recipe(network=network, steps=60), data, 0, accuracy)
    before = gradients.loss(training.model.eval(), (data.images, data.labels)).item()
    training.model.train()
    trained(training, 60)
    model = training.model.eval()
    assert gradients.loss(model, (data.images, data.labels)).item() < before
    batch = data.images[:4], data.labels[:4]
    pc.verify(model, lambda model, batch: gradients.loss(model, batch), batch)


def test_an_epoch_has_each_example_once(data):
    training = Training(recipe(), data, 0, accuracy)
    epochs = []
    for _ in range(2):
        chosen = []
        for _ in range(33 // 8):
            chosen += training._chosen().tolist()
            training.advance()
        assert len({*chosen}) == 32
        epochs.append(chosen)
    assert epochs[0] != epochs[1]


def test_measures_first_last_and_between(data):
    when = recipe(steps=500).measured()
    assert {0, 1, 500} <= when
    assert sum(step > 450 for step in when) >= 10
    training = trained(Training(recipe(), data, 0, accuracy), 12)
    assert training.done
    assert [at["step"] for at in training.history] == sorted(recipe().measured())
    history = [{"step": step, "x": float(step == 95)} for step in (0, 50, 91, 95, 100)]
    assert measures.late(history, "x") == 0


def test_the_gradient_can_be_switched(data):
    signs = gradients.SignOfSum()
    both, plain = (
        trained(Training(recipe(**settings), data, 0, accuracy), 2)
        for settings in ({"switch": (2, signs)}, {})
    )
    for training in (both, plain):
        training.advance()
    steps = [
        torch.cat([p.grad.flatten() for p in training.model.parameters()])
        for training in (both, plain)
    ]
    assert torch.equal(steps[0], steps[1].sign())


def test_images_are_varied_by_what_is_random(data):
    @dataclass(frozen=True)
    class Noise:
        def __call__(self, images):
            return images + torch.randn_like(images)

    settings = {"network": MLP(()), "steps": 3, "augment": Noise()}
    weights = [
        trained(Training(recipe(**settings), data, seed, accuracy), 3).model.output.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    plain = trained(Training(recipe(**{**settings, "augment": None}), data, 0, accuracy), 3)
    assert not torch.equal(weights[0], plain.model.output.weight)


def test_leaves_the_random_numbers_alone(data):
    state = torch.random.get_rng_state()
    trained(Training(recipe(network=MLP((7,), 0.5)), data, 3, accuracy), 4)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "settings",
    [
        {"network": MLP((7,), dropout=0.5)},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "RM3"},
        {"optimizer": "AdamW", "gradient": gradients.Robust(pc.TrimmedMean(1))},
    ],
    ids=str,
)
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_killed_run_goes_on_to_the_same_result(settings, at, data, tmp_path, monkeypatch):
    run = Run("run", recipe(**settings), data, 5, accuracy)
    straight = trained(Training(run.recipe, data, 5, accuracy), 12)
    monkeypatch.setattr(runs, "SECONDS", 0.0)
    advance = Training.advance

    def killed(training):
        if training.step == at:
            raise KeyboardInterrupt
        advance(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train([run], tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    torch.manual_seed(99)  # another process has other random numbers
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", lambda self: (steps.append(self.step), advance(self)))
        [found] = runs.train([run], tmp_path)
    assert steps == list(range(at, 12))
    assert found == json.loads(json.dumps(straight.history))
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_what_is_done_is_not_done_again(data, tmp_path, monkeypatch):
    run = Run("run", recipe(), data, 0, accuracy)
    [first] = runs.train([run], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", lambda self: pytest.fail("trained again"))
        assert runs.train([run], tmp_path) == [first]
        others = [
            Run("run", recipe(lr=0.2), data, 0, accuracy),
            Run("run", recipe(), data, 1, accuracy),
            Run("run", recipe(), data.labelled(data.labels.flip(0)), 0, accuracy),
            Run("run", recipe(), data, 0, lambda model, data: {}),
        ]
        for other in others:
            with pytest.raises(pytest.fail.Exception, match="trained again"):
                runs.train([other], tmp_path)


def test_a_training_that_diverges_is_no_result(data, tmp_path):
    """Its accuracy would be that of guessing the first class."""
    run = Run("run", recipe(lr=1e38, momentum=0.9), data, 0, accuracy)
    with pytest.raises(ValueError, match="expected finite weights after 12 steps of run, got NaN"):
        runs.train([run], tmp_path)
    assert not [*tmp_path.glob("*.json")]


def test_nan_is_null():
    assert runs.plain({"a": [float("nan"), 1.0], "b": float("inf")}) == {
        "a": [None, 1.0],
        "b": None,
    }
