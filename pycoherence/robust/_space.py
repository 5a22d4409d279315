"""Examples as points whose dot products are all that is known of them."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from pycoherence.capture import Factors
from pycoherence.sites import Site
from pycoherence.statistics import Batch

Needs = Literal["sq_norms", "gram", "distances"]
"""What a rule has to know; distances are differences of dot products, and may cancel."""

# Below this share of their squared norms a squared distance of float32 products is too inexact.
_CANCELS = 2.0**-10


class Space:
    """Points in float64 on the CPU: the examples, and behind them the centre if there is one.

    Attributes:
        gram: Dot products of all points, `[n, n]` or `[n + 1, n + 1]`; or squared norms of the
            examples, `[n]`.
        n: Number of examples.
        batch_size: `B`, with those that are not among them.
    """

    def __init__(self, gram: Tensor, n: int, batch_size: int) -> None:
        self.gram, self.n, self.batch_size = gram, n, batch_size

    @property
    def sq_norms(self) -> Tensor:
        """Of the examples, `[n]`."""
        return (self.gram if self.gram.dim() == 1 else self.gram.diagonal())[: self.n]

    @property
    def sq_distances(self) -> Tensor:
        """Between all points, never negative."""
        norms = self.gram.diagonal()
        found = (norms[:, None] + norms - 2 * self.gram).clamp(min=0)
        return found.fill_diagonal_(0)

    def distances_to(self, a: Tensor) -> Tensor:
        """From the examples to the point `sum_i a_i p_i`, `[n]`."""
        products = self.times(a)
        norm = (a * products).sum()
        return (self.gram.diagonal() - 2 * products + norm).clamp(min=0).sqrt()[: self.n]

    def times(self, a: Tensor) -> Tensor:
        """Dot products of all points with `sum_i a_i p_i`; the same for any number of threads."""
        return (self.gram * a).sum(1)

    def only(self, examples: Tensor) -> "Space":
        """Without the other examples."""
        if self.gram.dim() == 1:
            return Space(self.gram[examples], len(examples), self.batch_size)
        points = torch.cat([examples, torch.arange(self.n, len(self.gram))])
        return Space(self.gram[points][:, points], len(examples), self.batch_size)

    @property
    def cancels(self) -> bool:
        """Whether points are so close together that float32 products cannot tell how close."""
        norms = self.gram.diagonal()
        scale = norms[:, None] + norms
        close = (self.sq_distances < _CANCELS * scale).fill_diagonal_(False)
        return bool(close.any())


def measure(
    factors: Mapping[str, Factors],
    batch: Batch,
    needs: Needs,
    centre: Mapping[str, Tensor] | None,
) -> Space:
    """The space of the gradients `g_b`, over the parameters given.

    Args:
        factors: By parameter.
        batch: Its size and share.
        needs: What of it is needed; `centre` needs more than the norms.
        centre: Another point, by parameter, those left out being zero; `None` for no such point.
    """
    if needs == "sq_norms":
        total = torch.zeros(batch.size, dtype=torch.float64)
        for kept in factors.values():
            total += _read(kept.site.reduce(("sq_norms",)).sq_norms) * batch.share**2
        return Space(total, batch.size, batch.size)
    space = _products(((name, kept.site) for name, kept in factors.items()), batch, centre)
    if needs == "distances" and any(_is_short(kept) for kept in factors.values()):
        finite = space.sq_norms.isfinite().nonzero().flatten()
        if space.only(finite).cancels:
            # One at a time, since copies in float64 are twice as much to hold.
            sites = ((name, kept.with_tensors(_double)) for name, kept in factors.items())
            space = _products(sites, batch, centre)
    return space


def _products(
    sites: Iterable[tuple[str, Site]], batch: Batch, centre: Mapping[str, Tensor] | None
) -> Space:
    n = batch.size
    points = n + (centre is not None)
    total = torch.zeros(points, points, dtype=torch.float64)
    for name, site in sites:
        v = None if centre is None else centre.get(name)
        found = site.reduce(("gram",) if v is None else ("gram", "dots"), direction=v)
        total[:n, :n] += _read(found.gram) * batch.share**2
        if v is not None:
            dots = _read(found.dots) * batch.share
            total[:n, n] += dots
            total[n, :n] += dots
    if centre is not None:
        total[n, n] = sum(_sq_norm(v) for v in centre.values())
    return Space(total, n, n)


def _sq_norm(v: Tensor) -> float:
    # In rows, since torch splits a longer sum by the number of threads.
    rows = torch.stack([part.double().square().sum() for part in v.flatten().split(2**14)])
    return rows.sum().item()


def _read(found: Tensor | None) -> Tensor:
    assert found is not None
    return found.double().cpu()


def _is_short(kept: Factors) -> bool:
    tensors = (getattr(kept.site, name) for name in kept.versions)
    return any(x.is_floating_point() and x.dtype != torch.float64 for x in tensors)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
