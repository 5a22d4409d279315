"""Settings of the process that a test changes for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import pycoherence as pc


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def workspace(size: int) -> Iterator[None]:
    pc.set_workspace(size)
    try:
        yield
    finally:
        pc.set_workspace(None)
