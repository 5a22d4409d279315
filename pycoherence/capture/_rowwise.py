"""What is made of parameters alone and has a row for each example."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._capture import Capture
from pycoherence.capture._moves import FIRST


def batch_first(capture: Capture, x: Tensor, place: int) -> Tensor:
    """A tensor of a row for each example, as one of examples, `[B, ...]`.

    Args:
        capture: Of the pass.
        x: Such as a layer's input, or a learned first state that was expanded over the batch.
        place: Its dimension that is the batch.
    """
    if not capture.names_of(x):
        capture.layouts.expect(x, place, capture.refuse)
        return x if place == FIRST else x.transpose(0, 1)
    size = x.shape[place]
    shape = [n for d, n in enumerate(x.shape) if d != place]
    one_hot = torch.eye(size, dtype=x.dtype, device=x.device)
    rows = capture.make(lambda p: p.movedim(place, -1).reshape(-1, size), x)
    return capture.run(F.linear, one_hot, rows).view(size, *shape)
