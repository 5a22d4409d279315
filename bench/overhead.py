"""Measures what the capture adds to a training step beside the work of its statistics.

    python bench/overhead.py [--rounds N] [--profile]

Steps take turns: a plain one; one in a capture that measures nothing, where all parameters go
through the custom Functions; a forward pass alone; and one in a capture of a single parameter,
which looks at all functions and carries one out. Differences of medians are given for each use of
a parameter, and for each function looked at; they hold what it costs to open and close the block.
"""

import argparse
import cProfile
import pstats
import statistics
from collections.abc import Callable
from typing import Any

import torch
from clock import seconds_of
from networks import GPT, Task, make
from torch.overrides import TorchFunctionMode

from pycoherence.capture import Capture, Plan, tracked_parameters


class Counted(TorchFunctionMode):
    """Counts torch functions, and those that use parameters."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.all = self.tracked = 0
        self._parameters = {id(p) for p in task.model.parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.all += 1
        self.tracked += any(id(x) in self._parameters for x in args)
        return func(*args, **(kwargs or {}))


def plain(task: Task) -> None:
    task.model.zero_grad()
    task.loss().backward()


def captured(task: Task) -> None:
    """Everything but statistics: with no output asked for, sites give gradients alone."""
    task.model.zero_grad()
    with Capture(task.model, tracked_parameters(task.model), Plan({})):
        task.loss().backward()


def watched(task: Task) -> None:
    """A forward pass that the capture looks at."""
    task.model.zero_grad()
    name, parameter = next(reversed(tracked_parameters(task.model).items()))
    with Capture(task.model, {name: parameter}, Plan({})):
        task.loss()


def forward(task: Task) -> None:
    task.model.zero_grad()
    task.loss()


def medians(task: Task, rounds: int) -> dict[str, float]:
    """Seconds of each step."""
    steps: dict[str, Callable[[Task], None]] = {
        step.__name__: step for step in (plain, captured, forward, watched)
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            seconds = seconds_of(lambda step=step: step(task))
            if i:  # the first one warms up
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def small() -> Task:
    """As many functions as the GPT has, which compute next to nothing."""
    model = GPT(vocabulary=8, length=2, width=4, layers=4, heads=4, mean=True)
    return Task(model, torch.randint(8, (2, 2)), torch.randint(8, (2,)))


def show(title: str, task: Task, rounds: int) -> None:
    """Print what there is to say of a task."""
    with Counted(task) as counted:
        task.loss()
    found = medians(task, rounds)
    print(f"{title}: {counted.all} functions, {counted.tracked} of them of parameters")
    for name, seconds in found.items():
        print(f"  {name:9}{seconds * 1e3:9.3f} ms")
    whole, seen = found["captured"] - found["plain"], found["watched"] - found["forward"]
    print(f"  added: {whole / found['plain']:.1%}, {whole / counted.tracked * 1e6:.1f} us each use")
    print(f"  looking: {seen / counted.all * 1e6:.1f} us each function")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="where the time of a pass goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    show("GPT", make("GPT"), max(3, options.rounds // 4))
    task = small()
    show("the same GPT, of next to no width", task, options.rounds)
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(captured, task)
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
