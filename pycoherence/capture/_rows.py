"""How many rows the batch has, and how many of them make one example."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor

from pycoherence.capture._names import describe

Refuse = Callable[[str, str], NoReturn]


class Rows:
    """What the first use of a parameter says of the batch, and all others have to agree with.

    Args:
        group_size: Rows of one example.

    Attributes:
        size: Examples; `None` before the first use.
    """

    def __init__(self, group_size: int) -> None:
        self.size: int | None = None
        self._group_size = group_size
        self._source = ""

    @property
    def count(self) -> int | None:
        """Of all examples; `None` before the first use."""
        return None if self.size is None else self.size * self._group_size

    def expect(self, batched: Tensor, names: Sequence[str], fold: int, refuse: Refuse) -> int:
        """The number of examples, if an input has so many rows.

        Args:
            batched: The input.
            names: Of the parameters that it meets.
            fold: How many rows of the input belong to one row of the batch.
            refuse: Raises, from why and what to do.

        Raises:
            UnsupportedError: It has not.
        """
        if batched.dim() < 2:
            refuse(
                f"its input {tuple(batched.shape)} has no separate batch dimension",
                "give it an input [B, ...] of two or more dimensions; for ids of one position that "
                "is ids.unsqueeze(1), for positions that all examples share positions.expand(B, T)",
            )
        rows = batched.shape[0] // fold
        if self.size is None:
            if rows % self._group_size:
                refuse(
                    f"its input {tuple(batched.shape)} has {rows} rows, which are not whole groups "
                    f"of group_size={self._group_size}",
                    f"give it a multiple of {self._group_size} rows, each group's next to each "
                    "other",
                )
            self.size = rows // self._group_size
            self._source = f"{describe(names[0])} with input {tuple(batched.shape)}"
        if rows != self.count:
            refuse(
                f"its input {tuple(batched.shape)} has {rows} rows, but the batch size of this "
                f"block is {self.count}, as set by {self._source}",
                "keep the batch first in every layer: expand what all examples share to [B, ...], "
                "and do not fold positions into the batch",
            )
        return self.size

    def among(self, candidates: Sequence[Tensor], refuse: Refuse) -> int:
        """How many rows there are; before the first use, of the first dimensions the only one.

        Args:
            candidates: Tensors of which one or more have so many.
            refuse: As of `expect`.

        Raises:
            UnsupportedError: None of these tensors has so many, or that is not known.
        """
        sizes = {x.shape[0] for x in candidates if x.dim()}
        if self.count is not None:
            sizes &= {self.count}
        if len(sizes) != 1:
            shapes = ", ".join(str(tuple(x.shape)) for x in candidates)
            refuse(
                f"which dimension of its inputs {shapes} is the batch is not known",
                "keep the batch first in them",
            )
        return sizes.pop()
