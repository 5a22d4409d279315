"""Shifted images: every way as likely, each its own, and stable as part of a recipe."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tqdm")

from pycoherence.studies.augment import Shift

IMAGES = torch.arange(1.0, 601.0).view(10, 3, 4, 5)


def shifted(image, down, right):
    """Slowly: pixel by pixel."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


@pytest.mark.parametrize("pixels", [0, 1, 2])
@pytest.mark.parametrize("strided", [False, True])
def test_each_image_moves_one_way(pixels, strided):
    images = IMAGES.transpose(2, 3) if strided else IMAGES
    torch.manual_seed(1)
    seen = set()
    for _ in range(60):
        for before, after in zip(images, Shift(pixels)(images), strict=True):
            ways = [
                (down, right)
                for down in range(-pixels, pixels + 1)
                for right in range(-pixels, pixels + 1)
                if torch.equal(after, shifted(before, down, right))
            ]
            assert len(ways) == 1
            seen.add(ways[0])
    assert len(seen) == (2 * pixels + 1) ** 2


def test_is_drawn_from_the_global_numbers_and_leaves_its_input():
    images = IMAGES.clone()
    torch.manual_seed(3)
    first, second = Shift()(images), Shift()(images)
    torch.manual_seed(3)
    assert torch.equal(Shift()(images), first)
    assert not torch.equal(first, second)
    assert torch.equal(images, IMAGES)
    assert Shift()(images[:0]).shape == (0, 3, 4, 5)
    assert Shift(1)(images[:, :, :1, :1]).shape == (10, 3, 1, 1)


def test_far_shifts_leave_zeros():
    image = torch.ones(200, 1, 1, 1)
    torch.manual_seed(0)
    assert Shift(1)(image).mean() == pytest.approx(1 / 9, abs=0.08)
    assert torch.equal(Shift(0)(image), F.pad(image, [0] * 4))


def test_its_name_is_what_it_does():
    assert repr(Shift(1)) == "Shift(pixels=1)" == repr(Shift())
    assert Shift(1) == Shift() != Shift(2)


def test_mistakes():
    with pytest.raises(ValueError, match="pixels to be at least 0, got -1"):
        Shift(-1)
    with pytest.raises(ValueError, match=r"images \[B, C, H, W\], got \[3, 4, 5\]"):
        Shift()(IMAGES[0])
