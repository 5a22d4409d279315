"""A weight that multiplies feature vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.linear_reduce import materialise
from pycoherence.sites._site import joined, order, positions_last, reduce, shaped, side_by_side


@dataclass(frozen=True)
class LinearSite:
    """`G_b = sum_t g_bt x_bt^T`, the gradient of a weight `[O, I]` in `y = x W^T`.

    Attributes:
        x: Layer input, `[B, ..., I]`.
        g: Gradient with respect to the layer output, `[B, ..., O]`.
        shape: Shape of the parameter if it is not `[O, I]`.
    """

    x: Tensor
    g: Tensor
    shape: Sequence[int] | None = None

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        x, g = positions_last(self.x), positions_last(self.g)
        if self.shape is None:
            return reduce("linear_reduce", want, x, g, coef=coef, direction=direction)
        flat = None if direction is None else direction.reshape(g.shape[2], x.shape[2])
        return shaped(reduce("linear_reduce", want, x, g, coef=coef, direction=flat), self.shape)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`."""
        x, g = positions_last(self.x), positions_last(self.g)
        out = order("linear_order", len(g), x, g, rule=rule, k=k, drop=drop)
        return out if self.shape is None else out.view(tuple(self.shape))

    def norm_rows(self) -> tuple[Tensor, ...]:
        """As `norm_rows` of all sites; in float64 squares of rows would leave the range alone."""
        return () if self.x.dim() > 2 or self.x.dtype == torch.float64 else (self.x, self.g)

    def grouped(self, n: int) -> "LinearSite":
        """As `Site.grouped`."""
        x, g = joined(positions_last(self.x), n), joined(positions_last(self.g), n)
        return replace(self, x=x, g=g)

    def rows(self) -> Tensor:
        """As `Site.rows`."""
        rows = materialise(positions_last(self.x), positions_last(self.g)).joined()
        return rows if self.shape is None else rows.view(len(rows), *self.shape)

    def with_others(self, others: Sequence["LinearSite"]) -> "LinearSite | None":
        """As `Site.with_others`: further positions of the same examples."""
        sites = [self, *others]
        if any(site.shape != self.shape for site in sites):
            return None
        x = side_by_side([positions_last(site.x) for site in sites])
        g = side_by_side([positions_last(site.g) for site in sites])
        return replace(self, x=x.to(g.dtype), g=g)
