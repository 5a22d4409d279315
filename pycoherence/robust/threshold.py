"""The threshold that is carried from one step to the next."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Threshold:
    """The norm that `AdaptiveClip` clips at, which each step moves.

    It belongs to its rule (`rule.threshold`), so use one rule object for all steps, and another one
    for another model.

    Attributes:
        value: By the groups of the rule's `per`, `"network"` if there are none: tensors of no
            dimension. It is empty until the first step has ended.
    """

    def __init__(self) -> None:
        self.value: dict[str, Tensor] = {}
        self.reset()

    def __repr__(self) -> str:
        return f"Threshold({ {group: float(c) for group, c in self.value.items()} })"

    def reset(self) -> None:
        """Start anew."""
        self.value = {}
        self._inside: dict[str, Tensor | float] = {}
        self._seen = 0

    def state_dict(self) -> dict[str, float]:
        """The thresholds, for a checkpoint; counts of a step that has not ended are left out."""
        return {group: float(c) for group, c in self.value.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace it by what `state_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        wrong = [name for name, c in state.items() if not (isinstance(c, float) and c > 0)]
        if wrong:
            raise ValueError(
                "expected what rule.threshold.state_dict() gave, a positive number for each group, "
                f"got something else for {', '.join(map(repr, wrong))}"
            )
        self.reset()
        self.value = {group: torch.tensor(c, dtype=torch.float64) for group, c in state.items()}

    def count(self, inside: Mapping[str, Tensor | float], seen: int) -> None:
        """Add the examples of a batch, and how many of them are inside the threshold."""
        for group, n in inside.items():
            self._inside[group] = self._inside.get(group, 0.0) + n
        self._seen += seen

    def take(self) -> tuple[dict[str, Tensor | float], int]:
        """The counts of the step, which then start at zero."""
        found = self._inside, self._seen
        self._inside, self._seen = {}, 0
        return found
