"""Groups: the rows of a batch that make one example."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pycoherence.capture.facts import MIXED, period

GroupBy = Tensor | Callable[[int], Tensor]
"""The example of each row, or what tells it from the number of rows."""


class Misfit(Exception):
    """So many rows cannot be grouped.

    Attributes:
        why: The reason, in words that follow the number of rows.
        fix: The way out.
    """

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


class Groups(NamedTuple):
    """The example that each row of a batch belongs to.

    Attributes:
        rows: How many rows there are.
        count: How many examples.
        run: Row r belongs to example `(r // run) % count`, unless there is a table.
        table: The example of each row `[rows]`, if they lie in no such order.
    """

    rows: int
    count: int
    run: int
    table: Tensor | None = None

    def of(self, ids: Tensor) -> Tensor:
        """The examples that rows belong to; what is no single row's stays as it is."""
        if self.count == self.rows and self.table is None:
            return ids
        single = (ids >= 0) & (ids < MIXED)
        if self.table is None:
            found = ids // self.run % max(1, self.count)
        else:
            found = self.table.to(ids.device)[ids.where(single, 0)]
        return torch.where(single, found, ids)

    def sums(self, each: Tensor) -> Tensor:
        """`[rows, ...]` added up to `[count, ...]`, in a fixed order on every device."""
        if self.count == self.rows and self.table is None:
            return each
        if self.table is None:
            return each.unflatten(0, (-1, self.count, self.run)).sum((0, 2))
        total = each.new_zeros((self.count, *each.shape[1:]))
        return total.index_put_((self.table.to(each.device),), each, accumulate=True)

    def members(self, example: int, times: int = 1) -> Tensor:
        """The rows of one example, in their order; repeated as if there were several such."""
        rows = (self.of(torch.arange(self.rows)) == example).nonzero().flatten()
        return rows.unflatten(0, (-1, self.run)).repeat_interleave(times, 0).flatten()


class Grouping(NamedTuple):
    """How rows are grouped, before it is known how many there are.

    Attributes:
        size: How many consecutive rows make one example.
        by: The example of each row in its place.
    """

    size: int = 1
    by: GroupBy | None = None

    def __str__(self) -> str:
        return f"group_size={self.size}" if self.by is None else "group_by"

    def groups(self, rows: int) -> Groups:
        """The groups of so many rows.

        Raises:
            Misfit: There are too few, or too many.
        """
        if self.by is None:
            if rows % self.size:
                raise Misfit(
                    f"which are not whole groups of group_size={self.size}",
                    f"give it a multiple of {self.size} rows, each group's next to each other",
                )
            return Groups(rows, rows // self.size, self.size)
        ids = self.by if isinstance(self.by, Tensor) else self.by(rows)
        table = check_ids(ids).detach().cpu().long()
        if len(table) != rows:
            raise Misfit(
                f"while group_by names the examples of {len(table)}",
                "give group_by one number for each row of the batch",
            )
        count = int(table.max()) + 1 if rows else 0
        run = period(table, count)
        return Groups(rows, count, 1, table) if run is None else Groups(rows, count, run)


def check_grouping(group_size: Any, group_by: Any) -> Grouping:
    """The grouping that both arguments say together.

    Raises:
        TypeError: `group_size` is not an integer, or `group_by` neither a tensor of integers nor a
            function.
        ValueError: `group_size` is less than one, the numbers of `group_by` are not `[rows]` or do
            not name examples from 0 without gaps, or both are given.
    """
    why = f"expected group_size to be a whole number of rows, 1 or more, got {group_size!r}"
    if not isinstance(group_size, Integral) or isinstance(group_size, bool):
        raise TypeError(why)
    size = int(group_size)
    if size < 1:
        raise ValueError(why)
    if group_by is None:
        return Grouping(size)
    if size > 1:
        raise ValueError("expected either group_size or group_by, got both")
    if isinstance(group_by, Tensor):
        check_ids(group_by)
    elif not callable(group_by):
        raise TypeError(
            "expected group_by to be a tensor of the example of each row, or a function of the "
            f"number of rows that gives it, got {type(group_by).__name__}"
        )
    return Grouping(by=cast(GroupBy, group_by))


def check_ids(ids: Any) -> Tensor:
    """The ids, if they name examples from 0 without gaps."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"expected group_by to give a tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"expected group_by to hold whole numbers, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(
            f"expected group_by to be one number for each row, [rows], got shape {tuple(ids.shape)}"
        )
    if not ids.numel():
        return ids
    found = ids.unique()  # sorted
    first, last = int(found[0]), int(found[-1])
    if first < 0:
        raise ValueError(
            f"expected group_by to name examples from 0, got {first}; every row belongs to one. "
            "For rows of none, such as padding, say pc.mark_examples(x, owner=...)"
        )
    if last + 1 != len(found):
        missing = int((found != torch.arange(len(found), device=found.device)).nonzero()[0])
        raise ValueError(
            f"expected group_by to name examples without gaps, got no row of example {missing} "
            f"though the last one is {last}; number them by torch.unique(ids, return_inverse=True)"
        )
    return ids


__all__ = ["GroupBy", "Grouping", "Groups", "Misfit", "check_grouping"]
