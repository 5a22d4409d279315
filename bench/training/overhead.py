"""Measures what the capture adds to a training step beside the work of its statistics.

    python -m bench overhead [--rounds N] [--profile]

Steps take turns: a plain one; one in a capture that measures nothing, where all parameters go
through the custom Functions; a forward pass alone; and one in a capture of a single parameter,
which looks at all functions and carries one out. Differences of the least times are given for each
use of a parameter, which is a function that has parameters among its arguments, and for each
function looked at; they hold what it costs to open and close the block. The floor of each use is
what Functions that only compute take, under an empty mode (`floor.py`).

Then small models take a step with `collect(model, SqNorms())`, in which the norms are read, as a
multiple of a plain step, and the same by replay (`pc.compile`). The norms are first compared with
those of one example at a time, and the first replay with the block.
Everything runs on one thread.
"""

import cProfile
import functools
import pstats
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import pycoherence as pc
from bench.shared import options
from bench.shared.tasks import GPT, Task, loss, make, plain, with_norms
from bench.shared.timing import seconds_of
from bench.training.floor import Empty, floor_of
from bench.training.truth import LIMITS
from pycoherence.capture import Capture, Request, tracked_parameters

Step = Callable[[Task], object]

SHORTEST = 5e-3
"""Seconds for which steps are repeated at least, or the clock would be seen."""


class Counted(TorchFunctionMode):
    """Counts torch functions, and those that use parameters, by position, by name or in lists."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.all = self.tracked = 0
        self._parameters = {id(p) for p in task.model.parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.all += 1
        self.tracked += any(id(x) in self._parameters for x in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def unmeasured(model: nn.Module, last_alone: bool = False) -> AbstractContextManager[object]:
    """A capture that asks for no output, of all parameters or the last; no public name gives it."""
    parameters = tracked_parameters(model)
    if last_alone:
        parameters = dict([next(reversed(parameters.items()))])
    return Capture(model, parameters, Request({}))


def captured(task: Task) -> None:
    """Everything but statistics: sites give gradients alone."""
    task.model.zero_grad()
    with unmeasured(task.model):
        task.loss().backward()


def watched(task: Task) -> None:
    """A forward pass that the capture looks at."""
    task.model.zero_grad()
    with unmeasured(task.model, last_alone=True):
        task.loss()


def forward(task: Task) -> None:
    task.model.zero_grad()
    task.loss()


def least(task: Task, rounds: int, *steps: Step) -> list[float]:
    """Seconds of each step, undisturbed: other work on the machine can only add to them."""
    runs = [functools.partial(step, task) for step in steps]
    for run in runs:
        run()  # warms up
    repeats = [max(1, round(SHORTEST / seconds_of(run))) for run in runs]
    times = [[seconds_of(*each) for each in zip(runs, repeats, strict=True)] for _ in range(rounds)]
    return [min(found) for found in zip(*times, strict=True)]


def small() -> Task:
    """A task with the functions of the GPT, which compute next to nothing."""
    model = GPT(vocabulary=8, length=2, width=4, layers=4, heads=4, mean=True)
    return Task(model, torch.randint(8, (2, 2)), torch.randint(8, (2,)))


def show(title: str, task: Task, rounds: int) -> None:
    """Print what there is to say of a task."""
    with Counted(task) as counted:
        task.loss()
    steps = (plain, captured, forward, watched)
    names = [step.__name__ for step in steps]
    found = dict(zip(names, least(task, rounds, *steps), strict=True))
    print(f"{title}: {counted.all} functions, {counted.tracked} of them of parameters")
    for name, seconds in found.items():
        print(f"  {name:9}{seconds * 1e3:9.3f} ms")
    whole, seen = found["captured"] - found["plain"], found["watched"] - found["forward"]
    print(f"  added: {whole / found['plain']:.1%}, {whole / counted.tracked * 1e6:.1f} us each use")
    print(f"  looking: {seen / counted.all * 1e6:.1f} us each function")


def show_floor(task: Task, rounds: int) -> None:
    """Print what a capture in Python takes at least for each use of a parameter."""
    with Counted(task) as counted:
        task.loss()
    floored, found = floor_of(task)

    def at_least(_: Task) -> None:
        found.clear()
        with Empty():
            plain(floored)

    without, least_of_all = least(task, rounds, plain, at_least)
    added = (least_of_all - without) / counted.tracked
    print(f"  floor, with squared norms: {added * 1e6:.1f} us each use")


def classifier(model: nn.Module, *shape: int, classes: int) -> Task:
    """A task of a batch of `shape`."""
    return Task(model, torch.randn(shape), torch.randint(classes, shape[:1]))


def mlp() -> Task:
    """64-64-64-10 with ReLU."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return classifier(nn.Sequential(*layers), 64, 64, classes=10)


def lenet() -> Task:
    """LeNet-5, with ReLU and max pooling."""
    convolutions = [
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    layers = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return classifier(
        nn.Sequential(*convolutions, nn.Flatten(), *layers), 64, 1, 28, 28, classes=10
    )


def deep() -> Task:
    """Twenty layers that compute next to nothing."""
    layers = [layer for _ in range(20) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return classifier(nn.Sequential(*layers), 8, 16, classes=16)


def shallow() -> Task:
    """Six layers of 16, which have 12 parameters."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return classifier(nn.Sequential(*layers), 16, 16, classes=16)


def transformer() -> Task:
    """Six layers of width 64, on 8 sequences of 16."""
    model = GPT(vocabulary=64, length=16, width=64, layers=6, heads=4, mean=True)
    return Task(model, torch.randint(64, (8, 16)), torch.randint(64, (8,)))


SMALL: Mapping[str, Callable[[], Task]] = {
    "MLP 64-64-64-10, B=64": mlp,
    "LeNet 1x28x28, B=64": lenet,
    "20 layers of 16, B=8": deep,
    "6 layers of 16, B=16": shallow,
    "Transformer of 6 layers of 64, B=8": transformer,
}


def error_of_norms(task: Task) -> float:
    """Largest error of the squared norms over the largest of them, one example at a time."""
    truth, parameters = [], list(task.model.parameters())
    for each in task.losses():
        gradients = torch.autograd.grad(each, parameters, retain_graph=True)
        truth.append(sum(g.double().square().sum() for g in gradients))
    expected = torch.stack(truth)
    return ((with_norms(task).double() - expected).abs().max() / expected.max()).item()


def compare(title: str, task: Task, rounds: int) -> bool:
    """Print how long a step with norms takes; returns whether the norms are right."""
    error = error_of_norms(task)
    if not error <= LIMITS[torch.float32]:
        print(f"{title}: FAILED, squared norms are off by {error:.1e}")
        return False
    loss_fn = lambda model, batch: loss(model(batch[0]), batch[1])  # noqa: E731
    step = pc.compile(task.model, loss_fn, pc.SqNorms())
    batch = task.x, task.y

    def replayed(task: Task) -> Tensor:
        task.model.zero_grad()
        return step(batch).sq_norms

    without, measured, replay = least(task, rounds, plain, with_norms, replayed)
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in task.model.modules())
    added = (measured - without) / layers
    print(f"{title}: {without * 1e3:.3f} ms plain, {measured / without:.2f} times that with norms")
    print(f"  added: {added * 1e6:.1f} us each layer")
    share = (replay - without) / (measured - without)
    print(f"  by replay: {replay / without:.2f} times a plain step, {share:.0%} of what is added")
    return True


def main(argv: Sequence[str]) -> int:
    parser = options.parser("overhead", __doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="where the time of a pass goes")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    show("GPT", make("GPT"), max(3, given.rounds // 4))
    task = small()
    show("the same GPT, of next to no width", task, given.rounds)
    show_floor(task, given.rounds)
    right = [compare(title, new(), given.rounds) for title, new in SMALL.items()]
    if given.profile:
        profile = cProfile.Profile()
        profile.runcall(captured, task)
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    return 0 if all(right) else 1
