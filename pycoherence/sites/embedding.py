"""A table of vectors that are looked up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.embedding_reduce import materialise
from pycoherence.sites._site import FactoredSite, Side, joined, positions_last, side_by_side
from pycoherence.sites.linear import LinearSite


@dataclass(frozen=True)
class EmbeddingSite(FactoredSite):
    """`G_b[v] = sum of g_bt over the t with ids_bt = v`, the gradient of a table `[V, D]`.

    Attributes:
        ids: Looked-up rows, `[B, ...]`.
        g: Gradient with respect to the looked-up vectors, `[B, ..., D]`.
        num_embeddings: `V`.
        padding_idx: Row that receives no gradient, or `None`.
        shape: Shape of the parameter if it is not `[V, D]`.
    """

    family: ClassVar[str] = "embedding"

    ids: Tensor
    g: Tensor
    num_embeddings: int
    padding_idx: int | None
    shape: Sequence[int] | None = None

    @property
    def op_shape(self) -> tuple[int, ...]:
        """See `FactoredSite.op_shape`."""
        return self.num_embeddings, self.g.shape[-1]

    def head(self) -> tuple[Any, ...]:
        """See `FactoredSite.head`."""
        padding = -1 if self.padding_idx is None else self.padding_idx
        return (self.ids.flatten(1), positions_last(self.g), self.num_embeddings, padding)

    def chunks(self) -> Chunks:
        """See `FactoredSite.chunks`."""
        ids, g = self.ids.flatten(1).long(), positions_last(self.g)
        return materialise(ids, g, self._padded(), self.num_embeddings)

    def grouped(self, n: int) -> "EmbeddingSite":
        """See `Site.grouped`."""
        ids, g = joined(self.ids.flatten(1), n), joined(positions_last(self.g), n)
        return replace(self, ids=ids, g=g)

    def with_others(self, others: Sequence["EmbeddingSite"]) -> "EmbeddingSite | None":
        """See `Site.with_others`: further lookups of the same examples."""
        sites = [self, *others]
        tables = {(site.padding_idx, site.parameter_shape, site.op_shape) for site in sites}
        if len(tables) > 1:
            return None
        ids = side_by_side([site.ids.flatten(1) for site in sites])
        return replace(self, ids=ids, g=side_by_side([positions_last(site.g) for site in sites]))

    def plain(self) -> "EmbeddingSite":
        """See `FactoredSite.plain`."""
        ids, g = self.ids.flatten(1), positions_last(self.g)
        return replace(self, ids=ids, g=g, shape=None)

    def sides(self) -> tuple[Side, ...]:
        """See `FactoredSite.sides`."""
        return (Side(1, self.g.shape[2], 1, split={"g": (2, 1)}, whole=("ids",)),)

    def places(self) -> tuple[int, ...]:
        """See `FactoredSite.places`."""
        return (self.g.shape[1],)

    def options(self) -> tuple[Any, ...]:
        """See `FactoredSite.options`."""
        return (self.padding_idx,)

    def padded(self, positions: int) -> "EmbeddingSite":
        """See `FactoredSite.padded`: word 0 is looked up, and nothing comes back."""
        n = positions - self.g.shape[1]
        if not n:
            return self
        pad = torch.nn.functional.pad
        return replace(self, ids=pad(self.ids, (0, n)), g=pad(self.g, (0, 0, 0, n)))

    def narrowed(self, start: int, length: int) -> "EmbeddingSite | LinearSite":
        """The gradients of `length` rows of the table, from `start` on."""
        g, ids = positions_last(self.g), self.ids.flatten(1) - start
        if not length:
            return LinearSite(g, g.new_zeros(*g.shape[:2], 0))
        inside = (ids >= 0) & (ids < length) & ~self._padded()
        ids, g = torch.where(inside, ids, 0), torch.where(inside.unsqueeze(-1), g, 0)
        return EmbeddingSite(ids, g, length, None)

    def as_linear(self) -> LinearSite:
        """The same as the gradient of a weight `[V, D]`, whose outputs are what is looked up."""
        g = positions_last(self.g)
        found = torch.nn.functional.one_hot(self.ids.flatten(1).long(), self.num_embeddings)
        outputs = found.masked_fill_(self._padded().unsqueeze(-1), 0).to(g.dtype)
        return LinearSite(g, outputs, self.shape)

    def _padded(self) -> Tensor:
        ids = self.ids.flatten(1)
        return (
            torch.zeros_like(ids, dtype=torch.bool)
            if self.padding_idx is None
            else (ids == self.padding_idx)
        )
