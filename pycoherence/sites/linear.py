"""A weight that multiplies feature vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites._site import joined, order, positions_last, reduce


@dataclass(frozen=True)
class LinearSite:
    """`G_b = sum_t g_bt x_bt^T`, the gradient of a weight `[O, I]` in `y = x W^T`.

    Attributes:
        x: Layer input, `[B, ..., I]`.
        g: Gradient with respect to the layer output, `[B, ..., O]`.
    """

    x: Tensor
    g: Tensor

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        x, g = positions_last(self.x), positions_last(self.g)
        return reduce("linear_reduce", want, x, g, coef=coef, direction=direction)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`."""
        x, g = positions_last(self.x), positions_last(self.g)
        return order("linear_order", len(g), x, g, rule=rule, k=k, drop=drop)

    def norm_rows(self) -> tuple[Tensor, ...]:
        """As `norm_rows` of all sites; in float64 squares of rows would leave the range alone."""
        return () if self.x.dim() > 2 or self.x.dtype == torch.float64 else (self.x, self.g)

    def grouped(self, n: int) -> "LinearSite":
        """As `Site.grouped`."""
        return LinearSite(joined(positions_last(self.x), n), joined(positions_last(self.g), n))
