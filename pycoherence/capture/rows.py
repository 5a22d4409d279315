"""Brings the rows of a layer's tensors to `[B, T, ...]`, the form that all sites have.

A row is what a layer treats on its own: a position of a linear layer, an image of a convolution.
"""

import functools
from collections.abc import Callable
from math import prod
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from pycoherence.capture.facts import MIXED, Ids, Owner, Regular, ids_of
from pycoherence.capture.groups import Groups
from pycoherence.errors import UnsupportedError


class Rows(Protocol):
    """The arrangement of one call."""

    dims: int
    """How many of the first dimensions are rows."""

    def __call__(self, t: Tensor) -> Tensor:
        """`[*rows, *features]` to `[B, T, *features]`."""
        ...

    @property
    def check(self) -> Callable[[Tensor], None] | None:
        """Raises if the gradient of a row of no single example is not zero; `None` without such."""
        ...


class First:
    """The first dimension is the batch, all others of the rows are positions."""

    check = None

    def __init__(self, dims: int, run: int) -> None:
        self.dims, self._run = dims, run

    def __call__(self, t: Tensor) -> Tensor:
        n = self.dims
        t = t.unsqueeze(1) if n == 1 else t.flatten(1, n - 1) if n > 2 else t
        if self._run > 1:
            n = self._run
            t = t.reshape(t.shape[0] // n, n * t.shape[1], *t.shape[2:])
        return t


class Strided:
    """Row i of all belongs to example `(i // stride) % count`."""

    check = None

    def __init__(self, dims: int, stride: int, count: int) -> None:
        self.dims, self._stride, self._count = dims, stride, count

    def __call__(self, t: Tensor) -> Tensor:
        n = self.dims
        rest, rows = t.shape[n:], prod(t.shape[:n])
        stride, count = self._stride, self._count
        if not rows or not count:
            return t.new_zeros((count, 1, *rest))  # nothing, as one position of zeros
        outer = rows // (stride * count)
        split = t.reshape(outer, count, stride, *rest)
        return split.transpose(0, 1).reshape(count, outer * stride, *rest)


class Gathered:
    """Rows lie anywhere; examples with fewer than the most are padded with zeros."""

    def __init__(self, dims: int, ids: Tensor, count: int, function: str) -> None:
        self.dims, self._function = dims, function
        single = (ids >= 0) & (ids < MIXED)
        self._count = count
        self._others = (~single).nonzero().flatten()
        places = single.nonzero().flatten()
        owners = ids[places]
        order = torch.argsort(owners, stable=True)
        owners, places = owners[order], places[order]
        sizes = torch.bincount(owners, minlength=count) if count else owners
        most = max(1, int(sizes.max())) if len(sizes) else 1
        starts = sizes.cumsum(0) - sizes
        column = torch.arange(len(owners), device=ids.device) - starts[owners]
        # The last row of all is one more than there are: the padding.
        self._index = ids.new_full((count, most), len(ids))
        self._index[owners, column] = places

    def __call__(self, t: Tensor) -> Tensor:
        n = self.dims
        flat = t.reshape(prod(t.shape[:n]), *t.shape[n:])
        padded = torch.cat([flat, flat.new_zeros((1, *flat.shape[1:]))])
        return padded[self._index]

    @property
    def check(self) -> Callable[[Tensor], None] | None:
        """The check of `Rows.check`."""
        return self._check if len(self._others) else None

    def _check(self, g: Tensor) -> None:
        """Do as `Rows.check` says; this waits for the numbers."""
        n = self.dims
        flat = g.reshape(prod(g.shape[:n]), -1)
        if bool((flat[self._others] != 0).any()):
            _refuse_mixed(self._function)


def _refuse_mixed(function: str) -> NoReturn:
    raise UnsupportedError(
        f"{function}: a gradient arrives at rows of which no single example is the owner, since "
        "several are mixed in them or they are padding. What to do: keep examples apart until the "
        "loss is taken, leave padding out of the loss, or freeze the parameter with "
        "requires_grad_(False)."
    )


def rows_of(
    shape: tuple[int, ...],
    owner: Owner,
    features: int,
    groups: Groups,
    device: torch.device,
    function: str,
) -> Rows | None:
    """The arrangement of a tensor's rows; `None` if an owner varies within a row.

    Args:
        shape: Shape of the tensor.
        owner: Whose elements it holds.
        features: How many of its last dimensions are a row.
        groups: Which of the rows that owners tell of make one example.
        device: Device of the tensor.
        function: For messages.
    """
    n = len(shape) - features
    if isinstance(owner, Regular):
        if groups.table is None or 0 in shape:
            return _regular_rows(shape, owner, features, groups.run, groups.count)
        owner = Ids(ids_of(owner, shape, groups.table.device), owner.count)
    if isinstance(owner, Ids):
        ids = owner.ids
        if any(ids.shape[d] != 1 for d in range(n, len(shape))):
            return None
        flat = groups.of(ids.reshape(ids.shape[:n]).expand(shape[:n]).flatten()).to(device)
        return Gathered(n, flat, groups.count, function)
    return None


@functools.lru_cache(maxsize=4096)
def _regular_rows(
    shape: tuple[int, ...], owner: Regular, features: int, run: int, examples: int
) -> Rows | None:
    """The arrangement of rows that lie regularly; it holds no tensor.

    Row r of the batch belongs to example `(r // run) % examples`.
    """
    n = len(shape) - features
    rest, rows = prod(shape[n:]), prod(shape[:n])
    stride, count = owner
    whole = run * examples == count  # the rows of each example lie next to each other
    if n > 0 and whole and shape[0] == count and (0 in shape or stride * count == rows * rest):
        return First(n, run)
    if 0 in shape:
        return Strided(n, 1, examples)
    if count == 1:
        return Strided(n, rows, 1)
    if stride % max(1, rest) or rows % (stride // max(1, rest) * count):
        return None
    return Strided(n, stride // rest * run, examples)


__all__ = ["First", "Gathered", "Rows", "Strided", "ids_of", "rows_of"]
