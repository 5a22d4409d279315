"""The models and the steps that ranks take, and the truth of what they give."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pycoherence as pc
from bench.shared.tasks import GPT, Task, coordinates, gradient_at, loss, mlp
from bench.training.cases import Step, forget_gradients
from bench.training.truth import Truth


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
        name: For people.
        gradient: The name of what `.grad` holds afterwards.
        averaged: Whether the wrapper averages gradients in it.
        prepare: Makes the step of a rank's wrapped model and its part of the batch.
    """

    name: str
    gradient: str
    averaged: bool
    prepare: Callable[[Task], Step]


def plain(task: Task) -> Step:
    """Forward and backward pass, in which gradients are averaged."""
    return lambda: _pass(task)


def collected(statistic: pc.statistics.Statistic, together: bool, **names: str) -> Callable:
    """The same in `pc.collect`; outputs get their names from those of the record."""

    def prepare(task: Task) -> Step:
        def step() -> dict[str, Tensor]:
            group = dist.group.WORLD if together else None
            with pc.collect(task.model, statistic, group=group) as record:
                _pass(task)
            return {ours: getattr(record, theirs) for ours, theirs in names.items()}

        return step

    return prepare


def aggregated(rule: pc.robust.Rule) -> Callable[[Task], Step]:
    """The same in `pc.aggregate`."""

    def prepare(task: Task) -> Step:
        def step() -> dict[str, Tensor]:
            with pc.aggregate(task.model, rule, group=dist.group.WORLD):
                _pass(task)
            return {}

        return step

    return prepare


def _pass(task: Task) -> dict[str, Tensor]:
    forget_gradients(task.model)
    task.loss().backward()
    return {}


KRUM = pc.Krum(1, m=4)

DDP = Case("plain DDP", "mean", True, plain)

CASES = [
    DDP,
    Case("SqNorms", "mean", True, collected(pc.SqNorms(), False, own_sq_norms="sq_norms")),
    Case("SqNorms, group", "mean", True, collected(pc.SqNorms(), True, sq_norms="sq_norms")),
    Case("Gram, group", "mean", True, collected(pc.Gram(), True, gram="gram")),
    Case("Winsorized(2), group", "winsorized", True, aggregated(pc.Winsorized(2))),
    Case("Krum(1, m=4), group", "krum", False, aggregated(KRUM)),
]


def _mlp(batch: int) -> Task:
    return Task(mlp(), torch.randn(batch, 784), torch.randint(10, (batch,)))


def _gpt(batch: int) -> Task:
    model = GPT(vocabulary=256, length=64, width=128, layers=2, heads=4, mean=True)
    return Task(model, torch.randint(256, (batch, 64)), torch.randint(256, (batch,)))


TASKS: dict[str, tuple[Callable[[int], Task], int]] = {"MLP": (_mlp, 32), "GPT": (_gpt, 8)}
"""How to make each task, and the examples of each rank."""


def make(name: str, ranks: int, batch: int | None = None) -> Task:
    """The task of all ranks, with the same weights and examples in every process."""
    build, usual = TASKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(ranks * (batch or usual))


def part(task: Task, rank: int, ranks: int) -> Task:
    """That of one rank: its examples, and the model in a wrapper."""
    mine = own(task, rank, ranks)
    return Task(DistributedDataParallel(task.model), task.x[mine], task.y[mine])


def own(task: Task, rank: int, ranks: int) -> slice:
    """The place of a rank's examples."""
    each = len(task.y) // ranks
    return slice(rank * each, (rank + 1) * each)


def truth_of(task: Task) -> Truth:
    """The truth of all examples: autograd, one at a time, and for Krum one process with all."""
    truth, parameters = Truth.of(task), list(task.model.parameters())
    some = coordinates(parameters)
    outputs = {name: truth.outputs[name] for name in ("sq_norms", "gram", "winsorized")}
    outputs["mean"] = gradient_at(some, torch.autograd.grad(task.loss(), parameters)).double()
    alone = copy.deepcopy(task.model)
    with pc.aggregate(alone, KRUM):
        loss(alone(task.x), task.y).backward()
    outputs["krum"] = gradient_at(some, _gradients(alone)).double()
    return Truth(outputs, len(task.y))


def error(case: Case, step: Step, mine: Task, truth: Truth, own: slice) -> float:
    """The worst error of what a step gives on this rank, `.grad` included."""
    found = dict(step())
    gradients = _gradients(mine.model)
    found[case.gradient] = gradient_at(coordinates(gradients), gradients)
    theirs = truth.outputs | {"own_sq_norms": truth.outputs["sq_norms"][own]}
    return truth._replace(outputs=theirs).error(found)


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    return [g for g in found if g is not None]
