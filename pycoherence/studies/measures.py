"""What is found out about a network on the way, and how it is read afterwards."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import loss

Measured = dict[str, Any]
"""What was found at the weights of one step, ready for JSON."""


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are given their label, `[n]`."""
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return torch.cat([model(x).argmax(dim=1) == y for x, y in parts])


def accuracies(model: nn.Module, data: Data) -> Measured:
    """Shares of the labels that are given: of training (`train`), test, and what is true (`true`).

    `pristine` and `corrupt` are those of the training labels that are true and that are not.
    """
    right, pristine = correct(model, data.images, data.labels), data.pristine
    return {
        "train": share(right),
        "pristine": share(right[pristine]),
        "corrupt": share(right[~pristine]),
        "test": share(correct(model, data.test_images, data.test_labels)),
        "true": share(pristine),
    }


def coherence(model: nn.Module, images: Tensor, labels: Tensor) -> pc.Coherence:
    """That of the gradients of these examples, in one pass; the model's `.grad` are None after."""
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, (images, labels)).backward()
    model.zero_grad()
    return record.coherence()


def share(chosen: Tensor) -> float:
    """Share of what is true, nan of nothing."""
    return chosen.double().mean().item()


def first(history: Sequence[Measured], key: str, level: float) -> float:
    """The first step measured at which a share is reached; infinity if none."""
    return next((at["step"] for at in history if (at[key] or 0) >= level), float("inf"))


def late(history: Sequence[Measured], key: str) -> float:
    """The median of the last tenth of the steps, which no single one can spoil."""
    return median(at[key] for at in history if at["step"] > 0.9 * history[-1]["step"])
