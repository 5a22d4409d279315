"""A weight that is divided by a number made of it, as spectral normalisation does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites._joint import of_rows
from pycoherence.sites._site import Site, nested

_BY_ROWS = ("second_moment", "sign_sum")
_WITH_M = ("sq_norms", "sum_dots", "gram")


@dataclass(frozen=True)
class ShiftedSite:
    """`G_b = scale * site.G_b + coef_b M`: factored gradients, moved along one direction.

    Norms, dot products and sums are made of those of `site`, and of its dot products with `M`.
    Second moments, signs and robust aggregates take the gradients one by one, `[B, *shape]`.

    Attributes:
        site: The factors.
        scale: A number, of no dimension.
        coef: `[B]`, how far each gradient is moved.
        direction: Parameter-shaped, `M`.
    """

    site: Site
    scale: Tensor
    coef: Tensor
    direction: Tensor

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """See `Site.reduce`."""
        found = self._by_factors([x for x in want if x not in _BY_ROWS], coef, direction)
        by_rows = [name for name in want if name in _BY_ROWS]
        if by_rows:
            slow = of_rows(self.rows()).reduce(by_rows)
            found = found._replace(**{name: getattr(slow, name) for name in by_rows})
        return found

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """See `Site.order`, of rows."""
        return of_rows(self.rows()).order(rule, k, drop)

    def by_slices(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Site.by_slices`, of rows."""
        return of_rows(self.rows()).by_slices(function)

    def grouped(self, n: int) -> "ShiftedSite":
        """See `Site.grouped`."""
        coef = self.coef.unflatten(0, (len(self.coef) // n, n)).sum(1)
        return replace(self, site=self.site.grouped(n), coef=coef)

    def picked(self, examples: Tensor) -> "ShiftedSite":
        """See `Site.picked`."""
        coef = self.coef[examples.to(self.coef.device)]
        return replace(self, site=self.site.picked(examples), coef=coef)

    def rows(self) -> Tensor:
        """See `Site.rows`."""
        rows = self.site.rows()
        coef = self.coef.to(rows.dtype).view(-1, *[1] * self.direction.dim())
        return (rows * self.scale.to(rows.dtype)).addcmul_(coef, self.direction.to(rows.dtype))

    def with_others(self, others: Sequence["ShiftedSite"]) -> "ShiftedSite | None":
        """See `Site.with_others`: none, since others are moved along directions of their own."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """See `Site.tensors`: those of the site inside begin with `site.`."""
        own = {"scale": self.scale, "coef": self.coef, "direction": self.direction}
        return own | {f"site.{name}": x for name, x in self.site.tensors().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ShiftedSite":
        """See `Site.with_tensors`."""
        inner = nested(tensors, "site.")
        own = {name: x for name, x in tensors.items() if name.removeprefix("site.") not in inner}
        return replace(self, site=self.site.with_tensors(inner), **own)

    def _by_factors(
        self, want: Sequence[str], coef: Tensor | None, direction: Tensor | None
    ) -> Reduced:
        """The answers of reductions of `site`: products of two sums, multiplied out in float64."""
        if not want:
            return Reduced()
        across = any(name in want for name in _WITH_M)
        asked = {*want, "dots"} if across else {*want}
        inner = self.site.reduce(
            # A fixed order, as sets have none.
            [name for name in Reduced._fields if name in asked],
            coef=coef,
            direction=self.direction if across else direction,
        )
        theirs = inner.dots
        if across and "dots" in want:  # one pass takes one direction
            theirs = self.site.reduce(("dots",), direction=direction).dots
        terms = _Terms(self, inner.dots if across else None, coef)
        return Reduced(
            sq_norms=terms.square(inner.sq_norms),
            dots=terms.dots(theirs, direction) if "dots" in want else None,
            weighted_sum=terms.total(inner.weighted_sum),
            sum_dots=terms.sum_dots(inner.sum_dots),
            gram=terms.gram(inner.gram),
        )


class _Terms:
    """The products in which a shift has a part: `s` the scale, `c` the coefficients, `d = <G, M>`.

    Args:
        shift: The site.
        along: `d`, `[B]`, if it is needed.
        weights: The weights of `weighted_sum`; ones if `None`.
    """

    def __init__(self, shift: ShiftedSite, along: Tensor | None, weights: Tensor | None) -> None:
        self.direction = shift.direction
        self.s, self.c = shift.scale.double(), shift.coef.double()
        if along is not None:
            self.d = along.double()
            self.m = _product(self.direction, self.direction)
        self.weights = weights

    def square(self, norms: Tensor | None) -> Tensor | None:
        """`||s G_b + c_b M||^2`."""
        if norms is None:
            return None
        s, c, d = self.s, self.c, self.d
        return (s * s * norms.double() + c * (2 * s * d + c * self.m)).to(norms.dtype)

    def gram(self, gram: Tensor | None) -> Tensor | None:
        """`<s G_b + c_b M, s G_c + c_c M>`."""
        if gram is None:
            return None
        across = torch.outer(self.s * self.d + 0.5 * self.m * self.c, self.c)
        return (self.s * self.s * gram.double() + across + across.mT).to(gram.dtype)

    def dots(self, dots: Tensor | None, direction: Tensor | None) -> Tensor | None:
        """`<s G_b + c_b M, D>`."""
        assert dots is not None
        assert direction is not None
        along = _product(self.direction, direction)
        return (self.s * dots.double() + self.c * along).to(dots.dtype)

    def total(self, total: Tensor | None) -> Tensor | None:
        """`sum_b w_b (s G_b + c_b M)`."""
        if total is None:
            return None
        scale, shift = self.s.to(total.dtype), self._weighted(self.c).to(total.dtype)
        return scale * total + shift * self.direction.to(total.dtype)

    def sum_dots(self, dots: Tensor | None) -> Tensor | None:
        """`<s G_b + c_b M, sum_e w_e (s G_e + c_e M)>`."""
        if dots is None:
            return None
        s, c, d = self.s, self.c, self.d
        shift, along = self._weighted(c), self._weighted(d)
        across = shift * s * d + c * (s * along + shift * self.m)
        return (s * s * dots.double() + across).to(dots.dtype)

    def _weighted(self, x: Tensor) -> Tensor:
        """`sum_b w_b x_b`, without the examples whose weight is zero."""
        if self.weights is None:
            return x.sum()
        weights = self.weights.to(x.dtype)
        return torch.where(weights == 0, 0, weights * x).sum()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`<a, b>` in float64, by an op whose result is the same for any number of threads."""
    found = of_rows(a.double().unsqueeze(0)).reduce(("dots",), direction=b.double()).dots
    assert found is not None
    return found[0]
