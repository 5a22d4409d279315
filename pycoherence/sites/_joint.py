"""Several uses of one parameter, and uses of what is made of it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.sites._site import Site, positions_last
from pycoherence.sites.affine import AffineSite
from pycoherence.sites.embedding import EmbeddingSite
from pycoherence.sites.linear import LinearSite


def joint(sites: Sequence[Site]) -> Site:
    """The site of the sum of several gradients of one parameter, with all terms between them.

    Factors of one kind are put side by side. A table that is both looked up and multiplied with, as
    a tied embedding, is taken for a weight whose output gradients are one where something is looked
    up. Of others the gradients are added up as they are, `[B, *shape]`.
    """
    if len(sites) == 1:
        return sites[0]
    if {type(site) for site in sites} == {EmbeddingSite, LinearSite}:
        linear = [site.as_linear() if isinstance(site, EmbeddingSite) else site for site in sites]
        sites = linear if _are_smaller(linear) else sites
    kinds = {type(site) for site in sites}
    first: Any = sites[0]
    found = first.with_others(sites[1:]) if len(kinds) == 1 else None
    if found is not None:
        return found
    total = sites[0].rows()
    for site in sites[1:]:
        total += site.rows()
    return of_rows(total)


def of_rows(rows: Tensor) -> AffineSite:
    """The site of gradients `[B, *shape]` as they are."""
    return AffineSite(rows.reshape(len(rows), 1, -1), shape=tuple(rows.shape[1:]))


def made_of(site: Site, source: Tensor, leaves: Sequence[Tensor]) -> list[Site]:
    """The sites of the parameters that a tensor was made of, in no example's particular way.

    A block of a matrix, or of its transpose, leaves factors factors. Anything else takes the
    gradients `[B, *shape]` back through the graph of the tensor.

    Args:
        site: Of the tensor.
        source: The tensor, with its graph.
        leaves: The parameters.
    """
    if len(leaves) == 1:
        if source is leaves[0]:
            return [site]
        found = _within(site, source, leaves[0])
        if found is not None:
            return [found]
    rows = site.rows().to(source.dtype)
    if not len(rows):
        return [of_rows(leaf.new_zeros(0, *leaf.shape)) for leaf in leaves]
    with torch.enable_grad():
        found = torch.autograd.grad(
            source, leaves, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return [
        of_rows(leaf.new_zeros(len(rows), *leaf.shape) if grad is None else grad)
        for grad, leaf in zip(found, leaves, strict=True)
    ]


def _are_smaller(sites: Sequence[Any]) -> bool:
    """Whether factors of linear sites, side by side, take less memory than gradients."""
    x, g = (sum(getattr(site, name).numel() for site in sites) for name in ("x", "g"))
    rows = len(sites[0].x) * sites[0].x.shape[-1] * sites[0].g.shape[-1]
    return x + g < rows


def _within(site: Site, source: Tensor, leaf: Tensor) -> Site | None:
    """The site of the parameter, if its factors are those of the tensor but for zeros around."""
    shares = source.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    if not shares or source.dtype != leaf.dtype or not leaf.is_contiguous():
        return None
    if isinstance(site, AffineSite):
        same = source.is_contiguous() and source.numel() == leaf.numel()
        if not same:
            return None
        return AffineSite(site.g, site.x, site.mean, site.rstd, tuple(leaf.shape))
    if not isinstance(site, LinearSite) or site.shape is not None:
        return None
    if source.numel() == leaf.numel():
        shape = None if leaf.dim() == 2 else tuple(leaf.shape)
        if source.is_contiguous():
            return LinearSite(site.x, site.g, shape)
        if source.stride() == (1, len(source)):
            return LinearSite(site.g, site.x, shape)
    if leaf.dim() != 2:
        return None
    columns = leaf.shape[1]
    row, column = divmod(int(source.storage_offset() - leaf.storage_offset()), max(1, columns))
    x, g = positions_last(site.x), positions_last(site.g)
    if source.stride() == (1, columns) and columns > 1:
        x, g = g, x
    elif source.stride() != (columns, 1):
        return None
    if column + x.shape[2] > columns or row + g.shape[2] > leaf.shape[0]:
        return None
    return LinearSite(_around(x, column, columns), _around(g, row, leaf.shape[0]))


def _around(x: Tensor, start: int, size: int) -> Tensor:
    """`[B, T, n]` with zeros before and behind, `[B, T, size]`."""
    return x if x.shape[2] == size else F.pad(x, (start, size - start - x.shape[2]))
