"""A scale or a shift of one number per channel: normalisation layers and biases."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.affine_reduce import materialise
from pycoherence.sites._site import joined, order, reduce, shaped, side_by_side


@dataclass(frozen=True)
class AffineSite:
    """`G_b = sum_t g_bt (x_bt - mean) rstd`, or `sum_t g_bt` without `x`.

    Attributes:
        g: Gradient with respect to the layer output, `[B, T, C]`.
        x: What is normalised and then scaled, `[B, T, C]`, or `None` for a shift.
        mean: Broadcastable to `x`, or `None` for zero.
        rstd: Broadcastable to `x`, or `None` for one.
        shape: Shape of the parameter if it is not `[C]`.
    """

    g: Tensor
    x: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    shape: Sequence[int] | None = None

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        flat = None if direction is None else direction.flatten()
        head = (self.g, self.x, self.mean, self.rstd)
        out = reduce("affine_reduce", want, *head, coef=coef, direction=flat)
        if self.shape is None or len(self.shape) == 1:
            return out
        return shaped(out, self.shape)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`, of rows `[B, C]`."""
        rows = materialise(self.g, self.x, self.mean, self.rstd).joined()
        out = order("dense_order", len(rows), rows, rule=rule, k=k, drop=drop)
        return out if self.shape is None else out.view(tuple(self.shape))

    def norm_rows(self) -> tuple[Tensor, ...]:
        """As `norm_rows` of all sites: a shift that sees one position."""
        return (self.g[:, 0],) if self.x is None and self.g.shape[1] == 1 else ()

    def grouped(self, n: int) -> "AffineSite":
        """As `Site.grouped`."""
        factors = {name: getattr(self, name) for name in ("g", "x", "mean", "rstd")}
        rows = self.g.shape[:2]
        groups = {
            # What all positions of all examples share stays broadcast.
            name: f if f.shape[:2] == (1, 1) else joined(f.expand(*rows, -1), n)
            for name, f in factors.items()
            if f is not None
        }
        return replace(self, **groups)

    def rows(self) -> Tensor:
        """As `Site.rows`."""
        rows = materialise(self.g, self.x, self.mean, self.rstd).joined()
        return rows if self.shape is None else rows.view(len(rows), *self.shape)

    def with_others(self, others: Sequence["AffineSite"]) -> "AffineSite | None":
        """As `Site.with_others`, of shifts; scales have factors of their own."""
        sites = [self, *others]
        if any(site.x is not None or site.shape != self.shape for site in sites):
            return None
        return replace(self, g=side_by_side([site.g for site in sites]))
