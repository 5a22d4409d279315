"""A weight that multiplies feature vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.linear_reduce import materialise
from pycoherence.sites._site import FactoredSite, Side, joined, positions_last, side_by_side


@dataclass(frozen=True)
class LinearSite(FactoredSite):
    """`G_b = sum_t g_bt x_bt^T`, the gradient of a weight `[O, I]` in `y = x W^T`.

    Attributes:
        x: Layer input, `[B, ..., I]`.
        g: Gradient with respect to the layer output, `[B, ..., O]`.
        shape: Shape of the parameter if it is not `[O, I]`.
    """

    family: ClassVar[str] = "linear"

    x: Tensor
    g: Tensor
    shape: Sequence[int] | None = None

    @property
    def op_shape(self) -> tuple[int, ...]:
        """See `FactoredSite.op_shape`."""
        return self.g.shape[-1], self.x.shape[-1]

    def head(self) -> tuple[Tensor, Tensor]:
        """See `FactoredSite.head`."""
        return positions_last(self.x), positions_last(self.g)

    def chunks(self) -> Chunks:
        """See `FactoredSite.chunks`."""
        return materialise(*self.head())

    def norm_rows(self) -> tuple[Tensor, ...]:
        """See `norm_rows` of all sites; in float64 squares of rows would leave the range alone."""
        x, g = self.head()
        return () if x.shape[1] != 1 or x.dtype == torch.float64 else (x[:, 0], g[:, 0])

    def grouped(self, n: int) -> "LinearSite":
        """See `Site.grouped`."""
        x, g = self.head()
        return replace(self, x=joined(x, n), g=joined(g, n))

    def with_others(self, others: Sequence["LinearSite"]) -> "LinearSite | None":
        """See `Site.with_others`: further positions of the same examples."""
        sites = [self, *others]
        shapes = {(site.parameter_shape, site.op_shape) for site in sites}
        if len(shapes) > 1:
            return None
        x, g = (side_by_side(factors) for factors in zip(*(s.head() for s in sites), strict=True))
        return replace(self, x=x.to(g.dtype), g=g)

    def plain(self) -> "LinearSite":
        """See `FactoredSite.plain`."""
        return LinearSite(*self.head())

    def sides(self) -> tuple[Side, ...]:
        """See `FactoredSite.sides`."""
        rows, columns = self.op_shape
        return (
            Side(0, rows, 1, split={"g": (2, 1)}, whole=("x",)),
            Side(1, columns, 1, split={"x": (2, 1)}, whole=("g",)),
        )

    def places(self) -> tuple[int, ...]:
        """See `FactoredSite.places`."""
        return (self.g.shape[1],)

    def padded(self, positions: int) -> "LinearSite":
        """See `FactoredSite.padded`."""
        n = positions - self.g.shape[1]
        return LinearSite(F.pad(self.x, (0, 0, 0, n)), F.pad(self.g, (0, 0, 0, n)))

    def transposed(self) -> "LinearSite":
        """The gradients of the transposed weight, `[I, O]`."""
        return LinearSite(self.g, self.x)
