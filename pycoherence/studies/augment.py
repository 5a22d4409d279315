"""How images are varied each time they are trained on; see `trainer.Recipe.augment`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """Moves each image by a whole number of pixels, drawn anew from torch's random numbers.

    Pixels that come in at the edge are zero, the mean of every pixel in standardized images.

    Attributes:
        pixels: The most to move by, up or down and left or right; all ways are equally likely.
    """

    pixels: int = 1

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"expected pixels to be at least 0, got {self.pixels}")

    def __call__(self, images: Tensor) -> Tensor:
        """Images `[B, C, H, W]` like these.

        Raises:
            ValueError: They have another number of dimensions.
        """
        if images.dim() != 4:
            raise ValueError(
                f"expected images [B, C, H, W], got {list(images.shape)}; add dimensions of size "
                "one with .unsqueeze or .view"
            )
        count, channels, height, width = images.shape
        device = images.device
        padded = F.pad(images, [self.pixels] * 4)
        start = torch.randint(2 * self.pixels + 1, (2, count, 1), device=device)
        rows = start[0] + torch.arange(height, device=device)
        columns = start[1] + torch.arange(width, device=device)
        example = torch.arange(count, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[:, None, None]
        return padded[example, channel, rows[:, None, :, None], columns[:, None, None, :]]
