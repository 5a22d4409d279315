"""Examples as points whose dot products are all that is known of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from pycoherence.capture import Across, Factors, is_fake
from pycoherence.ops import Reduced
from pycoherence.ops.core.call import call_unchecked
from pycoherence.ops.core.dispatch import fastest, forced_backend
from pycoherence.ops.row_sq_norms import SPEC
from pycoherence.sites import Site, norm_rows, sq_norm
from pycoherence.statistics import Batch, raw_sq_norms

Requirement = Literal["sq_norms", "gram", "distances", "double"]
"""The products that a rule requires; distances are differences of dot products, and may cancel.

For `"distances"` products are taken in float64 if they do, for `"double"` always.
"""

Measured = Mapping[str, Mapping[str, Tensor]]
"""The outputs of a backward pass, by parameter and by name."""

# Below this share of their squared norms a squared distance of float32 products is too inexact.
_CANCELS = 2.0**-10

# Squared norms below have lost terms that are less than the least float32.
_UNDERFLOWS = 2.0**-100


class GramSpace:
    """Points in float64, where the gradients are: the examples, and behind them a centre if any.

    Examples that are not finite are left out: they lie at the origin, and `kept` says so. Nothing
    here waits for the device.

    Attributes:
        gram: Dot products of all points, `[B, B]` or `[B + 1, B + 1]`; or squared norms of the
            examples, `[B]`.
        kept: Which examples are not left out, `[B]`.
        n: How many these are, of no dimension.
        batch_size: `B`.
        weights: How much each example counts, `[B]`, float64; `None` if all count alike.
        dtype: The dtype in which the gradients' numbers are added up.
    """

    weights: Tensor | None = None
    dtype: torch.dtype = torch.float64

    def __init__(self, gram: Tensor, batch_size: int) -> None:
        self.batch_size = batch_size
        norms = gram if gram.dim() == 1 else gram.diagonal()
        self.kept = norms[:batch_size].isfinite()
        self.n = self.kept.sum().double()
        points = self.kept
        if gram.dim() == 2:
            points = torch.cat([points, torch.ones_like(norms[batch_size:], dtype=torch.bool)])
            points = points[:, None] & points
        self.gram = torch.where(points, gram, 0.0)

    @property
    def sq_norms(self) -> Tensor:
        """The squared norms of the examples, `[B]`."""
        norms = self.gram if self.gram.dim() == 1 else self.gram.diagonal()
        return norms[: self.batch_size]

    @property
    def shares(self) -> Tensor:
        """The parts that the examples have in a mean, `[B]`; they add up to one."""
        if self.weights is None:
            return self.kept / self.n
        weights = torch.where(self.kept, self.weights, 0.0)
        return weights / weights.sum()

    @property
    def sq_distances(self) -> Tensor:
        """Between all points, never negative."""
        norms = self.gram.diagonal()
        found = (norms[:, None] + norms - 2 * self.gram).clamp(min=0)
        return found.fill_diagonal_(0)

    @property
    def nearest_first(self) -> tuple[Tensor, Tensor]:
        """Squared distances from each example to all, `[B, B]` in order, and who they are.

        Its own comes first, -1; those to examples that are left out are infinite.
        """
        n = self.batch_size
        found = torch.where(self.kept, self.sq_distances[:n, :n], torch.inf).fill_diagonal_(-1)
        distances, examples = found.sort(dim=1, stable=True)
        return distances, examples

    @property
    def kept_indices(self) -> Tensor:
        """The places of the examples that are kept; it waits for the device."""
        return self.kept.nonzero().flatten()

    def distances_to(self, a: Tensor) -> Tensor:
        """From the examples to the point `sum_i a_i p_i`, `[B]`."""
        products = self.times(a)
        norm = (a * products).sum()
        found = (self.gram.diagonal() - 2 * products + norm).clamp(min=0).sqrt()
        return found[: self.batch_size]

    def times(self, a: Tensor) -> Tensor:
        """Dot products of all points with `sum_i a_i p_i`; the same for any number of threads."""
        return (self.gram * a).sum(1)

    @property
    def cancels(self) -> Tensor:
        """Whether points are so close together that float32 products cannot tell how close.

        So are examples near zero, whose products underflow; those of zero are not told apart.
        """
        norms = self.gram.diagonal()
        scale = norms[:, None] + norms
        near = self.sq_distances < _CANCELS * scale
        n = self.batch_size
        near[:n, :n] |= (scale[:n, :n] < _UNDERFLOWS) & self.kept[:, None] & self.kept
        return near.fill_diagonal_(False).any()


def measure(
    factors: Mapping[str, Factors],
    batch: Batch,
    requires: Requirement,
    centre: Mapping[str, Tensor] | None,
    across: Across | None = None,
    measured: Measured | None = None,
) -> GramSpace:
    """The space of the gradients `g_b`, over the parameters given.

    Args:
        factors: By parameter.
        batch: Its size and share.
        requires: The numbers that are needed; `centre` needs more than the norms.
        centre: Another point, by parameter, those left out being zero; `None` for no such point.
        across: The part that several processes take together, if the examples are theirs.
        measured: The outputs that the same pass has measured over the same examples, by parameter;
            norms and dot products among them are not taken again.
    """
    if requires == "sq_norms":
        known = [] if measured is None else [raw_sq_norms(measured[name]) for name in factors]
        if known and None not in known:
            total = torch.zeros(batch.size, dtype=torch.float64, device=_device(factors, centre))
            for norms in known:
                total += _like(total, norms)
            return GramSpace(total * batch.share**2, batch.size)
        size = batch.size if across is None else across.sizes[across.ranks.rank]
        total = torch.zeros(size, dtype=torch.float64, device=_device(factors, centre))
        _add_sq_norms(total, (kept.site for kept in factors.values()))
        if across is not None:
            across.ranks.step("squared norms")
            total = across.gather(total) * across.scales(total) ** 2
        return GramSpace(total * batch.share**2, batch.size)
    device = _device(factors, centre)
    # One at a time, since copies in float64 are twice as much to hold.
    double = ((name, kept.with_tensors(_double)) for name, kept in factors.items())
    if requires == "double":
        return GramSpace(_products(double, batch, centre, device, across), batch.size)
    sites = ((name, kept.site) for name, kept in factors.items())
    products = _products(sites, batch, centre, device, across, measured)
    space = GramSpace(products, batch.size)
    if requires != "distances" or not any(is_short(kept) for kept in factors.values()):
        return space
    cancels = space.cancels if across is None else across.decided(space.cancels)
    # All that the host waits for: what it starts next depends on it. A trace cannot, and has both.
    if is_fake(cancels) or bool(cancels):
        exact = _products(double, batch, centre, device, across)
        exact = torch.where(cancels, exact, products) if is_fake(cancels) else exact
        space = GramSpace(exact, batch.size)
    return space


def _add_sq_norms(total: Tensor, sites: Iterable[Site]) -> None:
    """Add those of all sites; of rows, in one launch for all of a device and dtype."""
    grouped = defaultdict[Any, list[tuple[Tensor, ...]]](list)
    for site in sites:
        rows = norm_rows(site)
        if rows and _is_native(rows):
            grouped[len(rows), rows[0].device, rows[0].dtype].append(rows)
        else:
            total += _like(total, site.reduce(("sq_norms",)).sq_norms)
    for found in grouped.values():
        norms = call_unchecked(
            "row_sq_norms", [row for rows in zip(*found, strict=True) for row in rows]
        )
        total += _like(total, norms.unflatten(0, (-1, len(found))).prod(0).sum(0))


def _is_native(rows: tuple[Tensor, ...]) -> bool:
    """Whether one launch takes many; otherwise the op of each site is the faster one."""
    free = forced_backend() in (None, "native")
    return free and fastest(SPEC, rows[0].device.type, (list(rows),)).name == "native"


def _products(
    sites: Iterable[tuple[str, Site]],
    batch: Batch,
    centre: Mapping[str, Tensor] | None,
    device: torch.device,
    across: Across | None,
    measured: Measured | None = None,
) -> Tensor:
    """The dot products of all points."""
    if across is not None:
        return _products_across(sites, batch, centre, device, across, measured)
    n = batch.size
    points = n + (centre is not None)
    total = torch.zeros(points, points, dtype=torch.float64, device=device)
    for name, site in sites:
        v = None if centre is None else centre.get(name)
        gram = None if measured is None else measured[name].get("gram")
        want = ("gram",) * (gram is None) + ("dots",) * (v is not None)
        found = site.reduce(want, direction=v) if want else Reduced()
        total[:n, :n] += _like(total, found.gram if gram is None else gram) * batch.share**2
        if v is not None:
            dots = _like(total, found.dots) * batch.share
            total[:n, n] += dots
            total[n, :n] += dots
    if centre is not None:
        for v in centre.values():
            total[n, n] += _like(total, sq_norm(v))
    return total


def _products_across(
    sites: Iterable[tuple[str, Site]],
    batch: Batch,
    centre: Mapping[str, Tensor] | None,
    device: torch.device,
    across: Across,
    measured: Measured | None,
) -> Tensor:
    """The same over the examples of several processes, each with its slices of the parameters."""
    n = batch.size
    gram, whole = torch.zeros(2, n, n, dtype=torch.float64, device=device)
    mine = torch.zeros(across.sizes[across.ranks.rank], dtype=torch.float64, device=device)
    for name, site in sites:
        known = None if measured is None else measured[name].get("gram")
        if known is None:
            gram += _like(gram, across.gram(name, site))
        else:
            whole += _like(whole, known)
        v = None if centre is None else centre.get(name)
        if v is not None:
            mine += _like(mine, site.reduce(("dots",), direction=v).dots)
    across.ranks.step("dot products")
    gram = (across.total_gram(gram) + whole) * batch.share**2
    if centre is None:
        return gram
    dots = across.gather(mine) * across.scales(mine) * batch.share
    norm = torch.zeros(1, 1, dtype=torch.float64, device=device)
    for v in centre.values():
        norm += _like(norm, sq_norm(v))
    return torch.cat([torch.cat([gram, dots[:, None]], 1), torch.cat([dots[None], norm], 1)])


def _device(factors: Mapping[str, Factors], centre: Mapping[str, Tensor] | None) -> torch.device:
    """The device of the points: that of the first parameter, if these are in several places."""
    return next(x.device for x in chain(factors.values(), (centre or {}).values()))


def _like(total: Tensor, found: Tensor | None) -> Tensor:
    assert found is not None
    return found.to(total.device, torch.float64)


def is_short(kept: Factors) -> bool:
    """Whether some factors have fewer digits than float64."""
    tensors = kept.tensors.values()
    return any(x.is_floating_point() and x.dtype != torch.float64 for x in tensors)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
