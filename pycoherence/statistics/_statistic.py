"""What a statistic tells the capture."""

from collections.abc import Mapping
from typing import Protocol

from pycoherence.capture import Shape


class Statistic(Protocol):
    """Something about the per-example gradients that a backward pass leaves in probes."""

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """The outputs to take of every site, and the shapes of their probes."""
        ...
