"""Train a network by gradients of a chosen kind, measuring on the way."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import Gradient, Mean
from pycoherence.studies.measures import Measured
from pycoherence.studies.models import Network


class Augment(Protocol):
    """How a batch is varied each time it is trained on."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` like these, by torch's global random numbers."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How to train: all that matters beside the data and the seed.

    Attributes:
        steps: Their number.
        gradient: The gradient to step along.
        switch: A step, and the gradient to take from then on.
        augment: How to vary the images of each batch.
        optimizer: Name of one of `torch.optim` or `pycoherence.optim`.
        momentum: None for an optimizer that has none.
        measurements: About how many, from before the first step to after the last.

    The last tenth of the steps is measured ten times, for `late`.
    """

    network: Network
    steps: int
    lr: float
    batch_size: int = 100
    gradient: Gradient = field(default_factory=Mean)
    switch: tuple[int, Gradient] | None = None
    augment: Augment | None = None
    optimizer: str = "SGD"
    momentum: float | None = None
    weight_decay: float = 0.0
    measurements: int = 40

    def measured(self) -> set[int]:
        """The steps to measure at: dense at first, when most happens."""
        n, last = self.measurements, self.steps
        late = (last - round(last * i / 100) for i in range(10))
        return {0, *(round(last ** (i / n)) for i in range(n + 1)), *late}

    def gradient_at(self, step: int) -> Gradient:
        """The gradient to step along next after `step` steps."""
        return self.switch[1] if self.switch and step >= self.switch[0] else self.gradient

    def stepper(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model."""
        kind = getattr(pc.optim, self.optimizer, None) or getattr(torch.optim, self.optimizer)
        options = {} if self.momentum is None else {"momentum": self.momentum}
        return kind(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, **options)


class Training:
    """One training, which can stop after any step and go on from its `state_dict`.

    Args:
        recipe: How to train.
        data: The data to train on.
        seed: Seed of the weights, the order of the examples, and all that a step draws.
        measure: The measurement; it may neither change the model nor draw random numbers.
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
        chosen, recipe = self._chosen(), self._recipe
        images, labels = self._data.images[chosen], self._data.labels[chosen]
        self._optimizer.zero_grad()
        with torch.random.fork_rng(self._devices()):
            # Seeded anew at each step, so that what is random needs no state of its own.
            torch.manual_seed(_seed("step", self._seed, self.step))
            images = images if recipe.augment is None else recipe.augment(images)
            recipe.gradient_at(self.step).fill(self.model, (images, labels), self._data)
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
        """The next examples: each once in an epoch, whose incomplete last batch is dropped."""
        size = min(self._recipe.batch_size, len(self._data.labels))
        epoch, i = divmod(self.step, len(self._data.labels) // size)
        if i == 0 or not hasattr(self, "_order"):
            generator = torch.Generator().manual_seed(_seed("epoch", self._seed, epoch))
            order = torch.randperm(len(self._data.labels), generator=generator)
            self._order = order.to(self._device)
        return self._order[i * size : (i + 1) * size]

    def _devices(self) -> list[torch.device]:
        return [self._device] if self._device.type == "cuda" else []


def _seed(*parts: Any) -> int:
    """A seed that has nothing to do with that of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
