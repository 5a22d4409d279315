"""Counts what this process receives from others, by wrapping the functions that send."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from pycoherence.ranks import Ranks


@dataclass
class Traffic:
    """Everything that this process has received.

    Attributes:
        numbers: How many, headers left out.
        bytes: Theirs.
        headers: How often all ranks have sent a header to all others.
        header_bytes: Those of the headers that came.
        calls: How often each function ran, headers left out.
    """

    numbers: Fraction = Fraction(0)
    bytes: Fraction = Fraction(0)
    headers: int = 0
    header_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count in the block what comes through `torch.distributed`.

    A sum over ranks counts as a ring sends it, `2 (R - 1) / R` of its numbers. Wrappers of a model
    send from C++, which is not seen here.
    """
    found, announcing = Traffic(), False
    say = Ranks._headers

    def headers(this: Ranks, *args: Any, **options: Any) -> list[list[int]]:
        nonlocal announcing
        announcing = True
        try:
            return say(this, *args, **options)
        finally:
            announcing = False

    def wrapped(name: str, received: "Received") -> Callable[..., Any]:
        send = getattr(dist, name)

        def call(*args: Any, group: Any, **options: Any) -> Any:
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            numbers = received(size, rank, *args, options.get("group_src"))
            itemsize = args[1 if name == "all_gather" else 0].itemsize
            if announcing:
                found.headers += 1
                found.header_bytes += int(numbers) * itemsize
            else:
                found.numbers += numbers
                found.bytes += numbers * itemsize
                found.calls[name] += 1
            return send(*args, group=group, **options)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Ranks, "_headers", headers))
        for name, received in _RECEIVED.items():
            stack.enter_context(mock.patch.object(dist, name, wrapped(name, received)))
        for name in _UNCOUNTED:
            stack.enter_context(mock.patch.object(dist, name, mock.Mock(side_effect=_refuse)))
        yield found


def _all_gather(size: int, rank: int, parts: list[Tensor], x: Tensor, _: None) -> Fraction:
    return Fraction(sum(part.numel() for part in parts) - parts[rank].numel())


def _broadcast(size: int, rank: int, x: Tensor, source: int) -> Fraction:
    return Fraction(0 if rank == source else x.numel())


def _all_to_all_single(
    size: int, rank: int, got: Tensor, sent: Tensor, counts: list[int], own: list[int], _: None
) -> Fraction:
    return Fraction(sum(counts) - counts[rank])


def _all_reduce(size: int, rank: int, x: Tensor, _: None) -> Fraction:
    return Fraction(2 * (size - 1) * x.numel(), size)


Received = Callable[..., Fraction]

_RECEIVED: dict[str, Received] = {
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "all_to_all_single": _all_to_all_single,
    "all_reduce": _all_reduce,
}
"""The numbers that a rank receives, from the ranks there are, its own and the arguments."""

_UNCOUNTED = (
    *("all_gather_into_tensor", "all_gather_object", "all_to_all", "batch_isend_irecv", "gather"),
    *("irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    "send",
)


def _refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("a function that is not counted has been called")
