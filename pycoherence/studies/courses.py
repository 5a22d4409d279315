"""How coherence goes over a training: where it rises to, when it is lost, what it adds up to."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pycoherence import metrics
from pycoherence.studies.measures import Measured, first

Course = Sequence[Measured]
"""The measurements of one training, in the order of its steps."""


def rise(course: Course, key: str = "whole") -> tuple[int, int]:
    """Indices of the trough and the peak of the largest rise, in whatever it is measured."""
    best, trough = (0, 0), 0
    for i, at in enumerate(course):
        if at[key] < course[trough][key]:
            trough = i
        if at[key] - course[trough][key] > course[best[1]][key] - course[best[0]][key]:
            best = trough, i
    return best


def peak(course: Course) -> Measured:
    """The end of the largest rise."""
    return course[rise(course)[1]]


def flat(course: Course, after: int = 0) -> Measured:
    """The first, from an index on, whose interval of M reaches down to 1; the last if none does."""
    return next((at for at in course[after:] if at["whole low"] <= 1), course[-1])


def each_step(course: Course, key: str = "whole") -> NDArray[np.float64]:
    """Values at all steps from 0, on straight lines between those measured."""
    steps = [at["step"] for at in course]
    return np.interp(np.arange(steps[-1] + 1), steps, [at[key] for at in course])


def until(course: Course, level: float, key: str = "whole") -> float:
    """The mean over the steps up to that with such a share of the labels fitted."""
    end = min(first(course, "train", level), course[-1]["step"])
    return float(each_step(course, key)[: int(end) + 1].mean())


def bound_sum(course: Course, sample: int, n: int, lr: float, level: float = 2.0) -> float:
    """The sum of the bound on the gap, with L = 1 and no smoothness, so that none counts most.

    Args:
        course: With m-coherence as `whole`.
        sample: Examples behind it.
        n: Training examples.
        lr: Size of a step.
        level: Share of the labels fitted at which to stop; more than 1 for all steps.
    """
    end = int(min(first(course, "train", level), course[-1]["step"]))
    alphas = (each_step(course)[:end] - 1) / (sample - 1)
    return metrics.generalization_bound(alphas.tolist(), lr, n, smoothness=0.0)
