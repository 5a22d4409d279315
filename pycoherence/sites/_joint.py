"""Several uses of one parameter."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pycoherence.sites._site import Site
from pycoherence.sites.affine import AffineSite
from pycoherence.sites.linear import LinearSite
from pycoherence.sites.sharded import ShardedSite, is_dtensor, split_rows


def joint(sites: Sequence[Any]) -> Site:
    """The site of the sum of several gradients of one parameter, with all terms between them.

    Factors of one kind are put side by side. A table that is both looked up and multiplied with, as
    a tied embedding, is taken for a weight whose output gradients are one where something is looked
    up, and blocks of a matrix for the whole with zeros around. Gradients of other kinds are
    added up as they are, `[B, *shape]`.
    """
    first: Any = sites[0]
    if len(sites) == 1:
        return first
    if len({type(site) for site in sites}) == 1:
        found = first.with_others(sites[1:])
        if found is not None:
            return found
    if all(isinstance(site, ShardedSite) and site.layout == first.layout for site in sites):
        return ShardedSite(joint([site.site for site in sites]), first.layout)
    linear = [_as_linear(site) for site in sites]
    known = [site for site in linear if site is not None]
    if len(known) == len(sites) and _are_smaller(known):
        found = known[0].with_others(known[1:])
        if found is not None:
            return found
    total = first.rows()
    for site in sites[1:]:
        total += site.rows()
    return of_rows(total)


class ComplexRows:
    """Complex gradients `[B, *shape]`, on their way back to what they were made of.

    A tracked parameter is real, so that nothing but `made_of` ever sees them.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def rows(self) -> Tensor:
        """The gradients."""
        return self._rows


def of_rows(rows: Tensor) -> Any:
    """The site of gradients `[B, *shape]` as they are."""
    if is_dtensor(rows):
        part, layout = split_rows(rows)
        return ShardedSite(of_rows(part), layout)
    if rows.is_complex():
        return ComplexRows(rows)
    shape = tuple(rows.shape[1:])
    return AffineSite(rows.reshape(len(rows), 1, math.prod(shape)), shape=shape)


def _as_linear(site: Any) -> LinearSite | None:
    """The same gradients with the factors of a weight, if they have such."""
    if isinstance(site, LinearSite):
        return site
    found = getattr(site, "as_linear", None)
    return None if found is None else found()


def _are_smaller(sites: Sequence[LinearSite]) -> bool:
    """Whether factors of linear sites, side by side, take less memory than gradients."""
    x, g = (sum(getattr(site, name).numel() for site in sites) for name in ("x", "g"))
    return x + g < len(sites[0].x) * math.prod(sites[0].op_shape)
