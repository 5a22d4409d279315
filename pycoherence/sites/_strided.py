"""Regions of a contiguous tensor, and whether they have elements in common."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Region(NamedTuple):
    """A strided part of a tensor that lies in memory row by row.

    Attributes:
        size: Argument of `torch.as_strided`, like the others.
        stride: In elements.
        offset: From the tensor's first element.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, whole: Tensor) -> "Region":
        """The region of `whole` that a view of it is; strides that are never taken are 1."""
        size = tuple(view.shape)
        stride = tuple(s if n > 1 else 1 for n, s in zip(size, view.stride(), strict=True))
        return cls(size, stride, int(view.storage_offset() - whole.storage_offset()))

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return math.prod(self.size)

    @property
    def end(self) -> int:
        """The position behind the last element."""
        steps = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        return self.offset + steps + 1 if self.numel else self.offset

    @property
    def is_dense(self) -> bool:
        """Whether the elements are a range, in the order of their positions."""
        expected = 1
        for n, s in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n > 1 and s != expected:
                return False
            expected *= n
        return True

    @property
    def transposed(self) -> "Region":
        """The same elements of a matrix, with rows for columns."""
        return Region(self.size[::-1], self.stride[::-1], self.offset)

    def within(self, x: Tensor, batch: int | None = None) -> Tensor:
        """A view of the region of a tensor.

        Args:
            x: Contiguous, `[*shape]`, or `[B, *shape]` if there is a batch.
            batch: `B`; each row has the region.
        """
        start = self.offset + x.storage_offset()
        if batch is None:
            return x.as_strided(self.size, self.stride, start)
        row = x.numel() // max(1, batch)
        return x.as_strided((batch, *self.size), (row, *self.stride), start)


def holds_each_once(region: Region) -> bool:
    """Whether no two elements of a region are the same number in memory."""
    return _are_nested(region) or _count(region) == region.numel


@functools.lru_cache(maxsize=4096)
def _count(region: Region) -> int:
    """How many positions the elements have."""
    seen = np.zeros(region.end - region.offset, dtype=bool)
    _elements(seen, region, region.offset)[...] = True
    return int(seen.sum())


def are_disjoint(regions: Iterable[Region]) -> bool:
    """Whether no two regions have an element in common."""
    before: list[Region] = []
    for region in sorted((r for r in regions if r.numel), key=lambda r: r.offset):
        # Only these have an end to look at: what ended before this one never comes back.
        before = [other for other in before if other.end > region.offset]
        if any(_meet(other, region) for other in before):
            return False
        before.append(region)
    return True


def _meet(one: Region, two: Region) -> bool:
    """Whether two regions whose extents overlap have an element in common."""
    return (one.is_dense and two.is_dense) or _meet_inside(one, two)


@functools.lru_cache(maxsize=4096)
def _meet_inside(one: Region, two: Region) -> bool:
    start, end = min(one.offset, two.offset), max(one.end, two.end)
    seen = np.zeros(end - start, dtype=bool)
    _elements(seen, one, start)[...] = True
    return bool(_elements(seen, two, start).any())


def _are_nested(region: Region) -> bool:
    """Whether each stride steps over all that smaller strides reach: enough, but not needed."""
    reach = 0
    for s, n in sorted(zip(region.stride, region.size, strict=True)):
        if n > 1:
            if s <= reach:
                return False
            reach += (n - 1) * s
    return True


def _elements(numbers: np.ndarray, region: Region, start: int) -> np.ndarray:
    """The elements of a region, from numbers whose first has the position `start`.

    These are numpy's: what torch did here a tracer would take for a part of the computation.
    """
    strides = [s * numbers.itemsize for s in region.stride]
    first = numbers[region.offset - start :]
    return np.lib.stride_tricks.as_strided(first, region.size, strides)
