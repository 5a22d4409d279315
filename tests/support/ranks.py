"""Work in several processes that talk to each other by gloo, each with one thread.

The processes stay alive for the whole session, since to start one takes seconds. Each piece of work
has a process group of its own.
"""

import atexit
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

_TIMEOUT = timedelta(seconds=20)
"""After which a collective that a rank has not joined raises."""


def run_ranks(world: int, work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Call `work(rank, *args)` in each of several processes.

    Args:
        world: How many.
        work: A function of a module.
        args: What it gets; they and its result are pickled.
        timeout: Seconds after which all processes are ended.

    Returns:
        The results in the order of ranks.

    Raises:
        AssertionError: A rank has raised, has died or has not returned in time.
    """
    found = try_ranks(world, work, *args, timeout=timeout)
    said = [f"rank {rank}: {one}" for rank, one in enumerate(found) if isinstance(one, RankError)]
    assert not said, "\n".join(said)
    return found


class RankError(Exception):
    """The error of a rank.

    Attributes:
        kind: The name of its class.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text


def try_ranks(world: int, work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Do as `run_ranks` does, with a `RankError` for the result of a rank that raised."""
    with tempfile.TemporaryDirectory() as folder:
        task = (str(Path(folder) / "store"), world, work, args)
        lines = [_Rank.of(rank) for rank in range(world)]
        for rank, line in enumerate(lines):
            line.pipe.send(sys.path)  # by which the function is found
            line.pipe.send((rank, *task))
        end = time.monotonic() + timeout
        found = [line.receive(end - time.monotonic()) for line in lines]
    if any(isinstance(one, RankError) for one in found):
        _Rank.end_all()  # one may still wait for another
    return found


class _Rank:
    """A process."""

    alive: ClassVar[dict[int, "_Rank"]] = {}

    def __init__(self, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.alive[rank] = self

    @classmethod
    def of(cls, rank: int) -> "_Rank":
        found = cls.alive.get(rank)
        return found if found is not None and found.process.is_alive() else cls(rank)

    @classmethod
    def end_all(cls) -> None:
        for rank in cls.alive.values():
            rank.process.kill()
            rank.process.join()
        cls.alive.clear()

    def receive(self, timeout: float) -> Any:
        try:
            if self.pipe.poll(max(timeout, 0.1)):
                return self.pipe.recv()
        except EOFError:
            return RankError("EOFError", "the process has died")
        self.process.kill()
        return RankError("TimeoutError", "it has not returned in time")


atexit.register(_Rank.end_all)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    while True:
        try:
            sys.path[:] = pipe.recv()
            rank, store, world, work, args = pipe.recv()
        except EOFError:
            return
        try:
            options = {"rank": rank, "world_size": world, "timeout": _TIMEOUT}
            dist.init_process_group("gloo", init_method=f"file://{store}", **options)
            try:
                found = work(rank, *args)
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            found = RankError(type(error).__name__, traceback.format_exc())
        pipe.send(found)
