"""What a study's network steps along: the ordinary gradient, or another of its batch."""

from dataclasses import dataclass
from typing import Protocol

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
            data: What it is from.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The ordinary gradient."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """As `Gradient.fill`."""
        loss(model, batch).backward()


@dataclass(frozen=True)
class Robust:
    """A robust aggregate of the per-example gradients, by a rule that carries nothing along."""

    rule: Rule

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """As `Gradient.fill`."""
        with pc.aggregate(model, self.rule):
            loss(model, batch).backward()


@dataclass(frozen=True)
class SignOfSum:
    """The sign of the ordinary gradient, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """As `Gradient.fill`."""
        loss(model, batch).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.sign_()


@dataclass(frozen=True)
class SumOfSigns:
    """The sum of the signs of the per-example gradients, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch, data: Data) -> None:
        """As `Gradient.fill`."""
        with pc.collect(model, pc.SignSum()) as record:
            loss(model, batch).backward()
        for name, p in model.named_parameters():
            p.grad = record.by_parameter[name].sign_sum.to(p)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)
