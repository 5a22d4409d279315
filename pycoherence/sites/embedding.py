"""A table of vectors that are looked up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites._site import joined, order, positions_last, reduce


@dataclass(frozen=True)
class EmbeddingSite:
    """`G_b[v] = sum of g_bt over the t with ids_bt = v`, the gradient of a table `[V, D]`.

    Attributes:
        ids: Looked-up rows, `[B, ...]`.
        g: Gradient with respect to the looked-up vectors, `[B, ..., D]`.
        num_embeddings: `V`.
        padding_idx: Row that receives no gradient, or `None`.
    """

    ids: Tensor
    g: Tensor
    num_embeddings: int
    padding_idx: int | None

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        return reduce("embedding_reduce", want, *self._head(), coef=coef, direction=direction)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`."""
        return order("embedding_order", len(self.g), *self._head(), rule=rule, k=k, drop=drop)

    def grouped(self, n: int) -> "EmbeddingSite":
        """As `Site.grouped`."""
        ids, g = joined(self.ids.flatten(1), n), joined(positions_last(self.g), n)
        return replace(self, ids=ids, g=g)

    def _head(self) -> tuple[Any, ...]:
        padding = -1 if self.padding_idx is None else self.padding_idx
        return (self.ids.flatten(1), positions_last(self.g), self.num_embeddings, padding)
