"""The processes that `torchrun` has started, each with a part of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among those that train one model together.

    Args:
        group: All of them, a `torch.distributed.ProcessGroup`; `None` for a process on its own.

    Attributes:
        group: All of them, or `None`.
        size: How many there are.
        rank: The place of this one among them.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size: int = 1 if group is None else group.size()
        self.rank: int = 0 if group is None else group.rank()

    def part(self, x: Tensor) -> Tensor:
        """The rows of this process; those of all processes in order are all rows."""
        return x.tensor_split(self.size)[self.rank]

    def share(self, x: Tensor) -> float:
        """The factor of a mean over `part(x)`, so that the mean over processes is that over `x`."""
        return len(self.part(x)) * self.size / len(x)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model to train, whose gradients become means over the processes."""
        return model if self.group is None else DistributedDataParallel(model)


@contextmanager
def launched(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that `torchrun` has started, and part from them at the end.

    Args:
        device: `"cpu"`, or `"cuda"` for a GPU of its own for each process.

    Returns:
        On entering, the processes, and the device of this one.

    Raises:
        ValueError: `torchrun` has not started this process.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ValueError(
            f"expected {missing[0]} in the environment, which torchrun sets, got none; run "
            "torchrun --nproc-per-node 2 -m pycoherence demo --distributed"
        )
    cuda = torch.device(device).type == "cuda"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.group.WORLD), device
    finally:
        dist.destroy_process_group()
