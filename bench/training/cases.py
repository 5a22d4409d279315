"""The cases that are timed in training: a plain step, ours and, in `rivals.py`, those of others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pycoherence as pc
from bench.shared.tasks import Task, coordinates, gradient_at
from bench.training.truth import Outputs

Step = Callable[[], Outputs]
"""One forward and backward pass with its statistics, which it returns by name."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: For people.
        kind: `"plain"`, `"ours"` or `"rival"`.
        prepare: Makes the step of a task, whose model it may change.
    """

    name: str
    kind: str
    prepare: Callable[[Task], Step]


def plain(task: Task) -> Step:
    """Forward and backward pass, no statistics."""

    def step() -> Outputs:
        forget_gradients(task.model)
        task.loss().backward()
        return {}

    return step


def collected(make: Callable[[], list], *outputs: str) -> Callable[[Task], Step]:
    """A pass in `pc.collect` with the statistics that `make` gives, after which all are read."""

    def prepare(task: Task) -> Step:
        def step() -> Outputs:
            forget_gradients(task.model)
            with pc.collect(task.model, *make()) as record:
                task.loss().backward()
            return {name: READ[name](record) for name in outputs}

        return step

    return prepare


def aggregated(make: Callable[[], pc.robust.Rule], name: str) -> Callable[[Task], Step]:
    """A pass in `pc.aggregate`, which leaves the aggregate in `.grad`."""

    def prepare(task: Task) -> Step:
        parameters = list(task.model.parameters())
        some = coordinates(parameters)

        def step() -> Outputs:
            forget_gradients(task.model)
            with pc.aggregate(task.model, make()):
                task.loss().backward()
            return {name: gradient_at(some, [p.grad for p in parameters])}

        return step

    return prepare


def meter(task: Task) -> Step:
    """One batch more for a meter of coherence."""
    found = pc.CoherenceMeter(task.model)

    def step() -> Outputs:
        forget_gradients(task.model)
        found.update(lambda model, batch: task.loss(), None)
        return {}

    return step


def forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _by_parameter(name: str) -> Callable[[pc.Record], Tensor]:
    def read(record: pc.Record) -> Tensor:
        parts = record.by_parameter.values()
        return torch.cat([getattr(part, name).flatten() for part in parts])

    return read


READ: dict[str, Callable[[pc.Record], Tensor]] = {
    "sq_norms": lambda record: record.sq_norms,
    "gram": lambda record: record.gram,
    "dots": lambda record: record.dots,
    "second_moment": _by_parameter("second_moment"),
    "sign_sum": _by_parameter("sign_sum"),
}

PLAIN = Case("plain", "plain", plain)

OURS = [
    Case(name, "ours", prepare)
    for name, prepare in {
        "SqNorms": collected(lambda: [pc.SqNorms()], "sq_norms"),
        "SqNorms+Moments": collected(
            lambda: [pc.SqNorms(), pc.Moments()], "sq_norms", "second_moment"
        ),
        "Gram": collected(lambda: [pc.Gram()], "gram"),
        'SqNorms+Dots("mean")': collected(
            lambda: [pc.SqNorms(), pc.Dots("mean")], "sq_norms", "dots"
        ),
        "SqNorms+SignSum": collected(lambda: [pc.SqNorms(), pc.SignSum()], "sq_norms", "sign_sum"),
        "everything": collected(
            lambda: [pc.SqNorms(), pc.Gram(), pc.Dots("mean"), pc.Moments(), pc.SignSum()],
            *READ,
        ),
        "CoherenceMeter.update": meter,
        "Winsorized(2)": aggregated(lambda: pc.Winsorized(2), "winsorized"),
        "MedianOfMeans(3)": aggregated(lambda: pc.MedianOfMeans(3), "median_of_means"),
        "NormClip(1)": aggregated(lambda: pc.NormClip(1.0), "norm_clip"),
    }.items()
]
