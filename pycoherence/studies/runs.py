"""Trainings that are kept: a killed study goes on from its last checkpoint."""

import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

import pycoherence as pc
from pycoherence.studies import augment, coherences, gradients, measures, models, trainer
from pycoherence.studies.data import Data
from pycoherence.studies.measures import Measured
from pycoherence.studies.trainer import Recipe, Training

SECONDS = 10.0
"""Between two checkpoints."""

CODE = [
    inspect.getsource(module)
    for module in (augment, coherences, gradients, measures, models, trainer)
]
"""The function that trains, as it was imported."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Run:
    """One training and what to find out on the way.

    Attributes:
        name: For people; files begin with it.
        measure: See `trainer.Training`.
    """

    name: str
    recipe: Recipe
    data: Data
    seed: int
    measure: Callable[[nn.Module, Data], Measured]

    def key(self) -> str:
        """The name and a hash of all that the result depends on, the code of training included."""
        parts = (
            *(repr(self.recipe), self.data.digest(), self.seed, str(self.data.images.device)),
            *(inspect.getsource(self.measure), torch.__version__, pc.__version__),
            *CODE,
        )
        return f"{self.name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def train_each(plans: Mapping[Key, Sequence[Run]], folder: Path) -> dict[Key, list[list[Measured]]]:
    """Do as `train`; give what each plan's runs found by its name."""
    found = iter(train([run for runs in plans.values() for run in runs], folder))
    return {key: [next(found) for _ in runs] for key, runs in plans.items()}


def train(runs: Sequence[Run], folder: Path) -> list[list[Measured]]:
    """The findings of each run, in their order.

    A finished run is kept in `folder` and not done again. A run that was cut off goes on from its
    last checkpoint and finds the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(run.recipe.steps for run in runs), unit="step", disable=None) as bar:
        return [_train(run, folder, bar) for run in runs]


def _train(run: Run, folder: Path, bar: Any) -> list[Measured]:
    key = run.key()
    result, checkpoint = folder / f"{key}.json", folder / f"{key}.pt"
    bar.set_description(run.name)
    if result.exists():
        bar.update(run.recipe.steps)
        return json.loads(result.read_text())
    with threads(run.data):
        training = Training(run.recipe, run.data, run.seed, run.measure)
        if checkpoint.exists():
            device = run.data.images.device
            training.load_state_dict(torch.load(checkpoint, device, weights_only=True))
            bar.update(training.step)
        saved = time.monotonic()
        while not training.done:
            training.advance()
            bar.update()
            if time.monotonic() - saved > SECONDS:
                with replacing(checkpoint) as part:
                    torch.save(training.state_dict(), part)
                saved = time.monotonic()
    if not all(p.isfinite().all() for p in training.model.parameters()):
        raise ValueError(
            f"expected finite weights after {run.recipe.steps} steps of {run.name}, got NaN or "
            "infinity: the study's learning rate is too high for these images; use other data"
        )
    with replacing(result) as part:
        part.write_text(json.dumps(plain(training.history)))
    checkpoint.unlink(missing_ok=True)
    return json.loads(result.read_text())


@contextmanager
def threads(data: Data) -> Iterator[None]:
    """One for small images, which only lose by sharing; nor do results depend on the cores then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if data.images[0].numel() <= 64 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is whole."""
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)


def plain(value: Any) -> Any:
    """The same for JSON, which has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
