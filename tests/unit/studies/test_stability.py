"""How much losses depend on the images, and accuracies on halves, against slow ways to find out."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from pycoherence.studies import measures
from pycoherence.studies.data import Data
from pycoherence.studies.models import CNN, MLP, Softmax

IMAGES = torch.randn(7, 2, 5, 3, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(7) % 3
DATA = Data("noise", IMAGES, LABELS, LABELS, IMAGES, LABELS, 3)
NETWORKS = {"mlp": MLP((6,)), "cnn": Softmax(CNN((4, 8), pooled=False))}


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(3)
    return NETWORKS[request.param].build(DATA).double().eval()


def loss(model, image, label):
    return F.cross_entropy(model(image[None]), label[None]).item()


def test_input_gradients_are_finite_differences(model):
    found, step = measures.input_gradients(model, IMAGES, LABELS), 1e-6
    for image, label, norm in zip(IMAGES, LABELS, found, strict=True):
        slopes = []
        for pixel in torch.eye(image.numel(), dtype=torch.float64).view(-1, *image.shape):
            ends = [loss(model, image + sign * step * pixel, label) for sign in (1, -1)]
            slopes.append((ends[0] - ends[1]) / (2 * step))
        assert norm.item() == pytest.approx(torch.tensor(slopes).norm().item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert not IMAGES.requires_grad


def test_changes_of_the_loss_under_noise(model):
    noise = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(5))
    state = torch.random.get_rng_state()
    found = measures.loss_changes(model, IMAGES, LABELS, 0.2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    for image, label, moved, change in zip(IMAGES, LABELS, noise, found, strict=True):
        far = loss(model, image + 0.2 * moved, label) - loss(model, image, label)
        assert change.item() == pytest.approx(abs(far), rel=1e-6)
    assert not measures.loss_changes(model, IMAGES, LABELS, 0.0).any()


def test_small_noise_moves_the_loss_along_the_input_gradient(model):
    """Over many draws the mean square is that of the gradient's norm."""
    norms = measures.input_gradients(model, IMAGES, LABELS)
    changes = [measures.loss_changes(model, IMAGES, LABELS, 1e-4, seed=seed) for seed in range(600)]
    found = torch.stack(changes).square().mean(0).sqrt() / 1e-4
    torch.testing.assert_close(found, norms, rtol=0.15, atol=1e-4)


def test_halves(model):
    guessed = model(IMAGES).argmax(dim=1)
    wrong = torch.where(torch.arange(7) % 2 == 0, (guessed + 1) % 3, guessed)
    data = Data("noise", IMAGES, guessed, guessed, IMAGES, wrong, 3)
    assert measures.halves(model, data) == {"train": 1.0, "attacked": 0.0, "held_out": 1.0}
