"""A scale or a shift of one number per channel: normalisation layers and biases."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from pycoherence.ops.affine_reduce import materialise
from pycoherence.ops.core.chunks import Chunks
from pycoherence.sites._site import FactoredSite, Side, joined, order, side_by_side


@dataclass(frozen=True)
class AffineSite(FactoredSite):
    """`G_b = sum_t g_bt (x_bt - mean) rstd`, or `sum_t g_bt` without `x`.

    Attributes:
        g: Gradient with respect to the layer output, `[B, T, C]`.
        x: The tensor that is normalised and then scaled, `[B, T, C]`, or `None` for a shift.
        mean: Broadcastable to `x`, or `None` for zero.
        rstd: Broadcastable to `x`, or `None` for one.
        shape: Shape of the parameter if it is not `[C]`.
    """

    family: ClassVar[str] = "affine"

    g: Tensor
    x: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    shape: Sequence[int] | None = None

    @property
    def op_shape(self) -> tuple[int, ...]:
        """See `FactoredSite.op_shape`."""
        return (self.g.shape[2],)

    def head(self) -> tuple[Any, ...]:
        """See `FactoredSite.head`."""
        return self.g, self.x, self.mean, self.rstd

    def chunks(self) -> Chunks:
        """See `FactoredSite.chunks`."""
        return materialise(*self.head())

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """See `Site.order`, of rows `[B, C]`."""
        rows = self.chunks().joined()
        out = order("dense_order", len(rows), rows, rule=rule, k=k, drop=drop)
        return self.as_parameter(out)

    def norm_rows(self) -> tuple[Tensor, ...]:
        """See `norm_rows` of all sites: a shift that sees one position."""
        return (self.g[:, 0],) if self.x is None and self.g.shape[1] == 1 else ()

    def grouped(self, n: int) -> "AffineSite":
        """See `Site.grouped`."""
        rows = self.g.shape[:2]
        groups = {
            # A factor that all positions of all examples share stays broadcast.
            name: f if f.shape[:2] == (1, 1) else joined(f.expand(*rows, f.shape[2]), n)
            for name, f in self.tensors().items()
        }
        return replace(self, **groups)

    def with_others(self, others: Sequence["AffineSite"]) -> "AffineSite | None":
        """See `Site.with_others`, of shifts; scales have factors of their own."""
        sites = [self, *others]
        shape = self.parameter_shape
        if any(site.x is not None or site.parameter_shape != shape for site in sites):
            return None
        return replace(self, g=side_by_side([site.g for site in sites]))

    def plain(self) -> "AffineSite":
        """See `FactoredSite.plain`: rows, of which there is one for each example."""
        if self.x is None and self.g.shape[1] == 1:
            return replace(self, shape=None)
        return AffineSite(self.chunks().joined().unsqueeze(1))

    def sides(self) -> tuple[Side, ...]:
        """See `FactoredSite.sides`."""
        return (Side(0, self.g.shape[2], 1, split={"g": (2, 1)}),)
