"""Train a network by gradients of a chosen kind, measuring on the way."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.robust import Rule
from pycoherence.studies.data import Data
from pycoherence.studies.models import Network

Batch = tuple[Tensor, Tensor]
"""Images `[B, C, H, W]` and their labels `[B]`."""

Measured = dict[str, Any]
"""What was found at the weights of one step, ready for JSON."""


class Gradient(Protocol):
    """How a batch becomes the `.grad` to step along."""

    def fill(self, model: nn.Module, batch: Batch) -> None:
        """Fill the `.grad` of all parameters, which are None."""
        ...


@dataclass(frozen=True)
class Mean:
    """The ordinary gradient."""

    def fill(self, model: nn.Module, batch: Batch) -> None:
        """As `Gradient.fill`."""
        loss(model, batch).backward()


@dataclass(frozen=True)
class Robust:
    """A robust aggregate of the per-example gradients, by a rule that carries nothing along."""

    rule: Rule

    def fill(self, model: nn.Module, batch: Batch) -> None:
        """As `Gradient.fill`."""
        with pc.aggregate(model, self.rule):
            loss(model, batch).backward()


@dataclass(frozen=True)
class SignOfSum:
    """The sign of the ordinary gradient, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch) -> None:
        """As `Gradient.fill`."""
        loss(model, batch).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.sign_()


@dataclass(frozen=True)
class SumOfSigns:
    """The sum of the signs of the per-example gradients, coordinate by coordinate."""

    def fill(self, model: nn.Module, batch: Batch) -> None:
        """As `Gradient.fill`."""
        with pc.collect(model, pc.SignSum()) as record:
            loss(model, batch).backward()
        for name, p in model.named_parameters():
            p.grad = record.by_parameter[name].sign_sum.to(p)


@dataclass(frozen=True)
class Recipe:
    """How to train: all that matters beside the data and the seed.

    Attributes:
        steps: Their number.
        gradient: What to step along.
        optimizer: Name of one of `torch.optim` or `pycoherence.optim`.
        momentum: None for an optimizer that has none.
        measurements: About how many, from before the first step to after the last.

    The last tenth of the steps is measured ten times, for `late`.
    """

    network: Network
    steps: int
    lr: float
    batch_size: int = 100
    gradient: Gradient = Mean()
    optimizer: str = "SGD"
    momentum: float | None = None
    weight_decay: float = 0.0
    measurements: int = 40

    def measured(self) -> set[int]:
        """The steps to measure at: dense at first, when most happens."""
        n, last = self.measurements, self.steps
        late = (last - round(last * i / 100) for i in range(10))
        return {0, *(round(last ** (i / n)) for i in range(n + 1)), *late}

    def stepper(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model."""
        kind = getattr(pc.optim, self.optimizer, None) or getattr(torch.optim, self.optimizer)
        options = {} if self.momentum is None else {"momentum": self.momentum}
        return kind(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, **options)


class Training:
    """One training, which can stop after any step and go on from its `state_dict`.

    Args:
        recipe: How to train.
        data: What on.
        seed: Of the weights, the order of the examples, and dropout.
        measure: What to find out; it may neither change the model nor draw random numbers.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        seed: int,
        measure: Callable[[nn.Module, Data], Measured],
    ) -> None:
        self._recipe, self._data, self._seed, self._measure = recipe, data, seed, measure
        self._device = data.images.device
        with torch.random.fork_rng(self._devices()):
            torch.manual_seed(_seed("weights", seed))
            self.model = recipe.network.build(data).to(self._device)
        self._optimizer = recipe.stepper(self.model)
        self._when = recipe.measured()
        self.step = 0
        self.history: list[Measured] = []
        self._look()

    @property
    def done(self) -> bool:
        """Whether the last step is taken."""
        return self.step >= self._recipe.steps

    def advance(self) -> None:
        """Take one step."""
        chosen = self._chosen()
        batch = self._data.images[chosen], self._data.labels[chosen]
        self._optimizer.zero_grad()
        with torch.random.fork_rng(self._devices()):
            # Seeded anew at each step, so that dropout needs no state of its own.
            torch.manual_seed(_seed("step", self._seed, self.step))
            self._recipe.gradient.fill(self.model, batch)
        self._optimizer.step()
        self.step += 1
        if self.step in self._when:
            self._look()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as tensors and plain values."""
        return {
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step, self.history = state["step"], state["history"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _look(self) -> None:
        self.model.eval()
        found = self._measure(self.model, self._data)
        self.model.train()
        self.history.append({"step": self.step, **found})

    def _chosen(self) -> Tensor:
        """The next examples: each once in an epoch, of which what is left over is dropped."""
        size = min(self._recipe.batch_size, len(self._data.labels))
        epoch, i = divmod(self.step, len(self._data.labels) // size)
        if i == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(_seed("epoch", self._seed, epoch))
            order = torch.randperm(len(self._data.labels), generator=generator)
            self._order = order.to(self._device)
        return self._order[i * size : (i + 1) * size]

    def _devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


def late(history: Sequence[Measured], key: str) -> float:
    """The median of the last tenth of the steps, which no single one can spoil."""
    return median(at[key] for at in history if at["step"] > 0.9 * history[-1]["step"])


def _seed(*parts: Any) -> int:
    """A seed that has nothing to do with that of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are given their label, `[n]`."""
    parts = zip(images.split(1000), labels.split(1000), strict=True)
    return torch.cat([model(x).argmax(dim=1) == y for x, y in parts])


def share(chosen: Tensor) -> float:
    """Share of what is true, nan of nothing."""
    return chosen.double().mean().item()
