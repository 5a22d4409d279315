"""What a loss has been multiplied by so that its gradients fit float16."""

import math
from typing import Any

import torch

from pycoherence.errors import UnsupportedError

LossScale = float | torch.amp.GradScaler
"""A number, or the scaler that multiplies the loss."""


def check_loss_scale(value: Any) -> LossScale:
    """The value, if losses can be multiplied by it.

    Raises:
        TypeError: It is neither a number nor a scaler.
        ValueError: It is not positive and finite.
    """
    if isinstance(value, torch.amp.GradScaler):
        return value
    why = f"expected loss_scale to be a positive number or a torch.amp.GradScaler, got {value!r}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(why)
    if not 0 < value < math.inf:
        raise ValueError(why)
    return float(value)


class Scaled:
    """The scale of the losses of one capture.

    Args:
        given: A number or a scaler.

    Attributes:
        value: Of the backward passes.
    """

    def __init__(self, given: LossScale) -> None:
        self._given = given
        self._is_read = False
        self.value = 1.0

    def read(self) -> None:
        """Read the scale, which a scaler changes after the step.

        Raises:
            UnsupportedError: It has changed since the last time.
        """
        given = self._given
        now = given.get_scale() if isinstance(given, torch.amp.GradScaler) else given
        if self._is_read and now != self.value:
            raise UnsupportedError(
                f"the scale of the loss was {self.value} in a backward pass of this block, and is "
                f"{now} now. What to do: call scaler.update() after the block."
            )
        self.value, self._is_read = now, True
