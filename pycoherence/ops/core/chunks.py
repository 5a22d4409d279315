"""Materialised gradients, in parts that fit the workspace."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycoherence.ops.core.workspace import workspace


class Chunks(NamedTuple):
    """Per-example gradients that are materialised a part of the batch at a time.

    Attributes:
        gradients: Gives the gradients `[b, *shape]` of a slice of the batch, in accumulation dtype.
        parts: The slices, which cover the batch in order.
        present: Gives for a slice which numbers are there, `[b, rows, 1]`; others are zeros
            whatever they are multiplied by. `None` if all are.
    """

    gradients: Callable[[slice], Tensor]
    parts: Sequence[slice]
    present: Callable[[slice], Tensor] | None = None

    @classmethod
    def of(
        cls,
        gradients: Callable[[slice], Tensor],
        batch: int,
        elements: int,
        dtype: torch.dtype,
        present: Callable[[slice], Tensor] | None = None,
    ) -> "Chunks":
        """Slices that keep `elements` numbers of each example within the workspace."""
        step = max(1, workspace() // max(1, elements * dtype.itemsize))
        starts = range(0, batch, step)
        parts = [slice(start, min(start + step, batch)) for start in starts]
        return cls(gradients, parts, present)

    def dots_with(self, direction: Tensor, part: slice) -> Tensor:
        """Dot products of the gradients of a slice with `[*shape]`, `[b]`."""
        rows = self.gradients(part)
        terms = rows * direction.to(rows.dtype).view(rows.shape[1:])
        if self.present is not None:
            terms = terms.where(self.present(part), 0)
        return terms.flatten(1).sum(1)

    def products(self, part: slice, others: "Chunks", other: slice) -> Tensor:
        """Dot products of the gradients of a slice with those of another, `[b, c]`."""
        left, right = self.gradients(part), others.gradients(other)
        found = products(left, right)
        if self.present is None or others.present is None or found.isfinite().all():
            return found
        # A zero that is not there times NaN is zero.
        both = self.present(part)[:, None] & others.present(other)
        return torch.stack(
            [
                (row * right).where(mask, 0).flatten(1).sum(1)
                for row, mask in zip(left, both, strict=True)
            ]
        )

    def joined(self) -> Tensor:
        """The gradients of the whole batch, `[B, *shape]`."""
        if len(self.parts) == 1:
            return self.gradients(self.parts[0])
        return torch.cat([self.gradients(part) for part in self.parts or [slice(0, 0)]])


def row_slices(size: int, unit: int, step: int) -> Iterator[slice]:
    """Slices of a parameter's rows, of at most `step`, of whole units if one of them fits."""
    block, step = (unit, step) if step < unit else (size, step - step % unit)
    for start in range(0, size, block):
        stop = min(size, start + block)
        yield from (slice(i, min(stop, i + step)) for i in range(start, stop, step))


# Longer rows lose digits: torch adds up each dot product of a product of matrices in one go.
_PIECE = 2**15


def products(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of `a` `[n, *shape]` with those of `b` `[m, *shape]`, `[n, m]`."""
    pieces = zip(a.flatten(1).split(_PIECE, 1), b.flatten(1).split(_PIECE, 1), strict=True)
    total = a.new_zeros(len(a), len(b))
    for left, right in pieces:
        total += left @ right.mT
    return total


def mirrored(gram: Tensor) -> Tensor:
    """The Gram of a batch with itself, with its lower triangle from the upper one.

    Parts of the batch may be of different sizes, for which products round otherwise.
    """
    return gram.triu() + gram.triu(1).mT
