"""Gradients that a study's network steps along: the ordinary one, or another of its batch."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.robust import Rule
from pycoherence.studies.data import Data

Batch = tuple[Tensor, Tensor]
"""Images `[B, C, H, W]` and their labels `[B]`."""


class Gradient(Protocol):
    """How a batch becomes the `.grad` to step along."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """Fill the `.grad` of all parameters, which are None.

        Args:
            model: In training mode.
            batch: To train on.
            data: The data that it is from.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The ordinary gradient."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """See `Gradient.fill`."""
        loss(model, batch).backward()


@dataclass(frozen=True)
class Robust:
    """A robust aggregate of the per-example gradients, by a rule that carries nothing along."""

    rule: Rule

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """See `Gradient.fill`."""
        with pc.aggregate(model, self.rule):
            loss(model, batch).backward()


@dataclass(frozen=True)
class SignOfSum:
    """The sign of the ordinary gradient, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """See `Gradient.fill`."""
        loss(model, batch).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.sign_()


@dataclass(frozen=True)
class SumOfSigns:
    """The sum of the signs of the per-example gradients, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """See `Gradient.fill`."""
        with pc.collect(model, pc.SignSum()) as record:
            loss(model, batch).backward()
        for name, p in model.named_parameters():
            p.grad = record.by_parameter[name].sign_sum.to(p)


@dataclass(frozen=True)
class Splitting:
    """The gradient of the batch's loss less that of an equal number of attacked test examples.

    Attributes:
        conditional: Leave the attack out where no more of its batch is right than by chance, which
            is 1.1 / classes: the 0.11 of the paper.
    """

    conditional: bool = False

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """See `Gradient.fill`; the test batch is drawn from torch's global random numbers."""
        images, labels = attacked(data)
        chosen = torch.randperm(len(labels))[: len(batch[1])].to(labels.device)
        outputs, labels = model(images[chosen]), labels[chosen]
        total = loss(model, batch)
        right = (outputs.argmax(dim=1) == labels).double().mean().item()
        if not self.conditional or right > 1.1 / data.classes:
            total = total - F.cross_entropy(outputs, labels)
        total.backward()


def attacked(data: Data) -> Batch:
    """Every second test example, from the first: those that splitting sees."""
    return data.test_images[::2], data.test_labels[::2]


def held_out(data: Data) -> Batch:
    """The other half of the test set, which it never sees."""
    return data.test_images[1::2], data.test_labels[1::2]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)
