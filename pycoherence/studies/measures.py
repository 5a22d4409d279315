"""Measures of a network on the way, and how they are read afterwards."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import attacked, held_out, loss

Measured = dict[str, Any]
"""The findings at the weights of one step, ready for JSON."""


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


def halves(model: nn.Module, data: Data) -> Measured:
    """Accuracies on the training set and the halves of the test set, `attacked` and `held_out`."""
    return {
        "train": share(correct(model, data.images, data.labels)),
        "attacked": share(correct(model, *attacked(data))),
        "held_out": share(correct(model, *held_out(data))),
    }


def input_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Norm of the gradient of each example's loss with respect to its image, `[n]`."""
    x = images.detach().requires_grad_()
    [gradient] = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    return gradient.flatten(1).norm(dim=1)


@torch.no_grad()
def loss_changes(
    model: nn.Module, images: Tensor, labels: Tensor, scale: float, *, seed: int = 0
) -> Tensor:
    """How far each example's loss moves when normal noise of this `scale` is added to it, `[n]`."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    moved = images + scale * noise.to(images)
    before, after = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, moved))
    return (after - before).abs()


def coherence(model: nn.Module, images: Tensor, labels: Tensor) -> pc.Coherence:
    """That of the gradients of these examples, in one pass; the model's `.grad` are None after."""
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, (images, labels)).backward()
    model.zero_grad()
    return record.coherence()


def share(chosen: Tensor) -> float:
    """Share of what is true, nan of nothing."""
    return chosen.double().mean().item()


def each_example(model: nn.Module, data: Data) -> Measured:
    """Do as `accuracies`; add the `marks` of the training labels that are given, as `right`."""
    return {**accuracies(model, data), "right": marks(correct(model, data.images, data.labels))}


def marks(chosen: Tensor) -> str:
    """Truth values `[n]`, as n times 0 or 1, which is short in JSON."""
    return "".join("01"[is_true] for is_true in chosen.tolist())


def marked(marks: str) -> Tensor:
    """The truth values that `marks` was made of."""
    return torch.tensor([mark == "1" for mark in marks], dtype=torch.bool)


def learnt_first(history: Sequence[Measured]) -> Tensor:
    """The first step at which `each_example` found it right, `[n]`; infinity if none."""
    return _earliest(history, torch.stack([marked(at["right"]) for at in history]))


def learnt_last(history: Sequence[Measured]) -> Tensor:
    """The first step from which on `each_example` found it right, `[n]`; infinity if none.

    Source: Zielinski, Krishnan and Chatterjee 2020, arXiv:2003.07422, in its published code.
    """
    right = torch.stack([marked(at["right"]) for at in history])
    return _earliest(history, right.flip(0).int().cumprod(dim=0).flip(0).bool())


def spearman(a: Tensor, b: Tensor) -> float:
    """The rank correlation of two `[n]`, equal values sharing their rank; nan if all are equal."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    norm = x.norm() * y.norm()
    return (x @ y / norm).item() if norm else float("nan")


def first(history: Sequence[Measured], key: str, level: float) -> float:
    """The first step measured at which a share is reached; infinity if none."""
    return next((at["step"] for at in history if (at[key] or 0) >= level), float("inf"))


def late(history: Sequence[Measured], key: str) -> float:
    """The median of the last tenth of the steps, which no single one can spoil."""
    return median(at[key] for at in history if at["step"] > 0.9 * history[-1]["step"])


def _earliest(history: Sequence[Measured], chosen: Tensor) -> Tensor:
    """The first step at which each of `[measurements, n]` is true."""
    steps = torch.tensor([at["step"] for at in history], dtype=torch.float64)
    return torch.where(chosen, steps[:, None], torch.inf).amin(dim=0)


def _ranks(values: Tensor) -> Tensor:
    """From the least on; those of equal values are their mean."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]
