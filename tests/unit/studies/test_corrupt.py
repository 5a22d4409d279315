"""Corruptions do what their rule says, exactly or by its probabilities, and nothing else."""

import pytest
import torch
from support.settings import threads

from pycoherence.studies import corrupt

CLASSES = 10
LABELS = torch.arange(5000) % CLASSES
IMAGES = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(3))

NOISE = {
    "permuted": corrupt.permuted_labels,
    "uniform": lambda labels, share, seed: corrupt.uniform_labels(
        labels, share, CLASSES, seed=seed
    ),
    "symmetric": lambda labels, share, seed: corrupt.symmetric_labels(
        labels, share, CLASSES, seed=seed
    ),
}
RUINED = {
    "shuffled": corrupt.shuffled_pixels,
    "random": corrupt.random_pixels,
    "gaussian": corrupt.gaussian_images,
    "blended": lambda images, seed: corrupt.blended_images(images, 0.5, seed=seed),
}
# The share of wrong labels if half of them are chosen.
WRONG = {"permuted": 0.45, "uniform": 0.45, "symmetric": 0.5}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_half_of_the_labels(kind, dtype):
    labels = LABELS.to(dtype)
    noisy = NOISE[kind](labels, 0.5, seed=1)
    assert noisy.dtype == dtype
    assert torch.equal(labels, LABELS.to(dtype))  # the input is left alone
    assert (noisy != labels).double().mean().item() == pytest.approx(WRONG[kind], abs=0.03)
    confused = torch.zeros(CLASSES, CLASSES).index_put_(
        (labels.long(), noisy.long()), torch.tensor(1.0), accumulate=True
    )
    others = confused[~torch.eye(CLASSES, dtype=torch.bool)]  # wrong labels are of every class
    assert others.min() > 5
    assert others.max() < 50


@pytest.mark.parametrize("kind", NOISE)
def test_none_all_and_seeds(kind):
    noise = NOISE[kind]
    assert torch.equal(noise(LABELS, 0.0, seed=0), LABELS)
    right = (noise(LABELS, 1.0, seed=0) == LABELS).double().mean().item()
    assert right == (0 if kind == "symmetric" else pytest.approx(0.1, abs=0.02))
    assert torch.equal(noise(LABELS, 0.5, seed=4), noise(LABELS, 0.5, seed=4))
    assert not torch.equal(noise(LABELS, 0.5, seed=4), noise(LABELS, 0.5, seed=5))
    assert noise(LABELS[:0], 0.5, seed=0).shape == (0,)


def test_permuting_keeps_the_classes():
    skewed = LABELS.square() % CLASSES
    noisy = corrupt.permuted_labels(skewed, 0.3, seed=0)
    assert torch.equal(noisy.bincount(), skewed.bincount())


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize(
    ("labels", "share", "error", "message"),
    [
        (LABELS, 1.5, ValueError, r"share to be in \[0, 1\], got 1.5"),
        (LABELS, float("nan"), ValueError, "share"),
        (LABELS[None], 0.5, ValueError, r"labels \[n\]"),
        (LABELS.float(), 0.5, TypeError, "integer labels"),
    ],
)
def test_wrong_labels_are_refused(kind, labels, share, error, message):
    with pytest.raises(error, match=message):
        NOISE[kind](labels, share, seed=0)


@pytest.mark.parametrize("kind", ["uniform", "symmetric"])
def test_labels_outside_the_classes_are_refused(kind):
    with pytest.raises(ValueError, match=r"labels in \[0, 10\), got values from 0 to 10"):
        NOISE[kind](torch.tensor([0, 10]), 0.5, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        corrupt.symmetric_labels(torch.zeros(3, dtype=torch.long), 0.5, 1, seed=0)


def pixels(images):
    """The channels of each pixel as one tuple, for each image."""
    return [[tuple(pixel) for pixel in image.flatten(1).T.tolist()] for image in images]


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_pixels_are_permuted(kind):
    ruined = RUINED[kind](IMAGES, seed=0)
    where = [
        [old.index(pixel) for pixel in new]
        for old, new in zip(pixels(IMAGES), pixels(ruined), strict=True)
    ]
    for order in where:
        assert sorted(order) == list(range(20))
        assert order != sorted(order)
    assert len({tuple(order) for order in where}) == (1 if kind == "shuffled" else len(IMAGES))


def test_training_and_test_images_are_shuffled_alike():
    whole = corrupt.shuffled_pixels(IMAGES, seed=2)
    assert torch.equal(corrupt.shuffled_pixels(IMAGES[:2], seed=2), whole[:2])


def test_gaussian_images_match_mean_and_variance():
    images = 5 + 3 * torch.rand(500, 1, 8, 8)
    drawn = corrupt.gaussian_images(images, seed=0)
    assert drawn.mean().item() == pytest.approx(images.mean().item(), abs=0.02)
    assert drawn.var().item() == pytest.approx(images.var().item(), rel=0.03)
    flat = torch.stack([drawn.flatten(), images.flatten()])
    assert abs(torch.corrcoef(flat)[0, 1].item()) < 0.03  # nothing of the images is left


@pytest.mark.parametrize("kind", RUINED)
def test_images_keep_shape_and_follow_the_seed(kind):
    ruin, before = RUINED[kind], IMAGES.clone()
    ruined = ruin(IMAGES.double(), seed=0)
    assert (ruined.shape, ruined.dtype) == (IMAGES.shape, torch.float64)
    assert torch.equal(ruin(IMAGES, seed=6), ruin(IMAGES, seed=6))
    assert not torch.equal(ruin(IMAGES, seed=6), ruin(IMAGES, seed=7))
    assert torch.equal(IMAGES, before)
    with pytest.raises(ValueError, match=r"images \[n, C, H, W\]"):
        ruin(IMAGES[0], seed=0)


def test_gaussian_images_need_floats():
    with pytest.raises(TypeError, match="floating images"):
        corrupt.gaussian_images(IMAGES.byte(), seed=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blended_images_are_between_image_and_noise(share):
    noise = corrupt.gaussian_images(IMAGES, seed=2)
    blended = corrupt.blended_images(IMAGES, share, seed=2)
    for old, drawn, new in zip(IMAGES.flatten(), noise.flatten(), blended.flatten(), strict=True):
        assert new.item() == pytest.approx(
            (1 - share) * old.item() + share * drawn.item(), abs=1e-6
        )


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_blended_images_need_a_share(share):
    with pytest.raises(ValueError, match=r"share to be in \[0, 1\]"):
        corrupt.blended_images(IMAGES, share, seed=0)
    with pytest.raises(TypeError, match="floating images"):
        corrupt.blended_images(IMAGES.byte(), 0.5, seed=0)


def test_the_number_of_cores_does_not_show():
    images = torch.randn(300, 3, 20, 20, generator=torch.Generator().manual_seed(4))
    images -= images.mean()  # a sum that cancels shows in which order it was added up
    made = []
    for cores in (1, 2, 3):
        with threads(cores):
            made.append(corrupt.blended_images(images, 0.5, seed=0))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
