"""From the examples of this rank and the whole parameter to all examples and a slice of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.ranks import Ranks, digest
from pycoherence.sites._joint import of_rows
from pycoherence.sites._site import FactoredSite, Side, Site
from pycoherence.sites._strided import Region
from pycoherence.sites.parts import PartsSite


class Slice(NamedTuple):
    """A slice of a parameter, with the examples of all ranks in their order.

    Attributes:
        site: Their gradients there.
        put: Writes numbers of the shape of the slice to their place in a contiguous tensor of the
            parameter's shape.
    """

    site: Site
    put: Callable[[Tensor, Tensor], None]


def exchange(site: Site, ranks: Ranks, name: str, scale: float | None = None) -> Iterator[Slice]:
    r"""The slices of this rank; those of all ranks together are the parameter.

    Either the factors of one side go all-to-all, so that each rank gets its channels of all
    examples, and the others are gathered; or the gradients themselves go all-to-all:

    .. math:: \text{factors:}\ \frac{R-1}{R} B T \Big(a + \frac{c}{R}\Big) \qquad
        \text{gradients:}\ \frac{R-1}{R} \frac{B P}{R}

    numbers that each rank receives, with `a` channels gathered and `c` split, `T` the largest
    number of positions on any rank, and `P` the size of the parameter. The way of fewer bytes is
    taken. It goes in parts, so that what comes at once fits the workspace, beside the factors that
    are gathered. All ranks take all slices, in order.

    Args:
        site: The factors of this rank's examples.
        ranks: The processes to exchange with.
        name: The name of the parameter, which all have to give.
        scale: The number that the gradients of this rank are multiplied with; `None` on all ranks
            if on none.

    Raises:
        RanksError: The ranks do not exchange the same parameter.
    """
    site = _exchangeable(site)
    places = site.places() if isinstance(site, FactoredSite) else ()
    room = workspace(next(iter(site.tensors().values())).device)
    said = ranks.step(f"exchange of {name}", [_batch_of(site), room, _code(site), *places])
    sizes = [header[0] for header in said]
    if len({header[2] for header in said}) > 1 or _lie_apart(said, places):
        # Such as several uses of a parameter, which are joined otherwise where texts are short, or
        # images of several sizes. The gradients themselves are alike on all ranks.
        site = of_rows(site.rows()).plain()
    if isinstance(site, PartsSite):
        for i, part in enumerate(site.parts):
            for found in exchange(part.site, ranks, f"{name}, part {i}", scale):
                yield Slice(found.site, partial(_put_part, part.region, found.put))
        return
    assert isinstance(site, FactoredSite)
    if len(site.places()) == 1:
        site = site.padded(max(header[3] for header in said))
    if scale is not None:  # one too, since that of others may be zero, and halves become float32
        site = site.scaled(scale)
    # All work through equally many parts, those that fit the smallest of their workspaces.
    yield from _slices(site, ranks, sizes, min(header[1] for header in said))


def _slices(site: Any, ranks: Ranks, sizes: Sequence[int], room: int) -> Iterator[Slice]:
    side, by_factors = _cheapest(site, ranks.size)
    way = _Way(site, side, ranks, sizes)
    bounds = list(pairwise(side.units * rank // ranks.size for rank in range(ranks.size + 1)))
    unit = _bytes_split(site, side) if by_factors else _bytes_made(site, side)
    step = max(1, room // max(1, ceil(unit * sum(sizes))))
    pieces = ceil(max(1, *(b - a for a, b in bounds)) / step)
    gathered = {f: ranks.gather(getattr(site, f), sizes) for f in side.whole if by_factors}
    for i in range(pieces):
        spans = [(a + (b - a) * i // pieces, a + (b - a) * (i + 1) // pieces) for a, b in bounds]
        found = way.by_factors(spans, gathered) if by_factors else way.by_gradients(spans)
        start, stop = spans[ranks.rank]
        if start < stop:
            place = side.dim, start * side.size, (stop - start) * side.size
            yield Slice(found, partial(_put, tuple(site.op_shape), place))


Spans = Sequence[tuple[int, int]]
"""For each rank the first unit of its slice, and the end."""


class _Way(NamedTuple):
    """An exchange along one side.

    Attributes:
        site: The factors of this rank.
        side: The side that is split.
        ranks: The processes.
        sizes: How many examples each has.
    """

    site: Any
    side: Side
    ranks: Ranks
    sizes: Sequence[int]

    def by_factors(self, spans: Spans, gathered: Mapping[str, Tensor]) -> Site:
        """The factors of all examples, those of the split side of this rank's slice alone."""
        found = dict(gathered)
        start, stop = spans[self.ranks.rank]
        for field, (axis, channels) in self.side.split.items():
            shape = list(getattr(self.site, field).shape[1:])
            shape[axis - 1] = (stop - start) * channels
            found[field] = self._swapped([self._cut(field, *span) for span in spans], shape)
        return self.site.cut(self.side, found, stop - start)

    def by_gradients(self, spans: Spans) -> Site:
        """The gradients of all examples, of this rank's slice alone."""
        none = self.site.g.new_empty(0, dtype=accumulate_dtype(self.site.g.dtype))
        parts: list[Tensor] = []
        for a, b in spans:
            fields = {field: self._cut(field, a, b) for field in self.side.split}
            parts.append(self.site.cut(self.side, fields, b - a).rows() if a < b else none)
        start, stop = spans[self.ranks.rank]
        shape = list(self.site.op_shape)
        shape[self.side.dim] = (stop - start) * self.side.size
        return of_rows(self._swapped(parts, shape))

    def _cut(self, field: str, start: int, stop: int) -> Tensor:
        axis, n = self.side.split[field]
        return getattr(self.site, field).narrow(axis, start * n, (stop - start) * n)

    def _swapped(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        return torch.cat(self.ranks.swap(parts, [[size, *shape] for size in self.sizes]))


def _cheapest(site: Any, size: int) -> tuple[Side, bool]:
    """The side to split, and whether factors are fewer bytes than gradients."""
    sides: Sequence[Side] = site.sides()
    costs = [
        sum(_bytes(getattr(site, field)) for field in side.whole)
        + _bytes_split(site, side) * side.units / size
        for side in sides
    ]
    best = min(range(len(sides)), key=costs.__getitem__)
    made = _bytes_made(site, sides[0]) * sides[0].units / size
    if costs[best] <= made:
        return sides[best], True
    return max(sides, key=lambda side: side.units), False


def _bytes(x: Tensor) -> float:
    """The bytes of each example; of factors that have no example, those that one would have."""
    return prod(x.shape[1:]) * x.dtype.itemsize


def _bytes_split(site: Any, side: Side) -> float:
    """The bytes of the factors of each unit of a side and each example."""
    return sum(_bytes(getattr(site, field)) for field in side.split) / max(1, side.units)


def _bytes_made(site: Any, side: Side) -> float:
    """The bytes of the gradient of each unit of a side and each example."""
    return prod(site.op_shape) * accumulate_dtype(site.g.dtype).itemsize / max(1, side.units)


def _exchangeable(site: Site) -> Site:
    """The same gradients, as factors that can be exchanged."""
    if isinstance(site, PartsSite):
        return site
    if isinstance(site, FactoredSite):
        plain = site.plain()
        if plain.sides():
            return plain
    return of_rows(site.rows()).plain()


def _lie_apart(said: Sequence[Sequence[int]], places: Sequence[int]) -> bool:
    """Whether ranks have other positions, and zeros behind the last do not mend that."""
    return len(places) > 1 and len({tuple(header[3:]) for header in said}) > 1


def _batch_of(site: Any) -> int:
    return _batch_of(site.parts[0].site) if isinstance(site, PartsSite) else len(site.g)


def _code(site: Any) -> int:
    """A number that tells kinds of factors apart."""
    if isinstance(site, PartsSite):
        found = ("parts", site.shape, [part.region for part in site.parts])
    else:
        dtypes = [str(x.dtype) for x in site.tensors().values()]
        found = (type(site).__name__, tuple(site.op_shape), dtypes, site.options())
    return digest(repr(found))


def _put(shape: Sequence[int], place: tuple[int, int, int], out: Tensor, value: Tensor) -> None:
    target = out.view(tuple(shape)).narrow(*place)
    target.copy_(value.view_as(target))


def _put_part(
    region: Region, put: Callable[[Tensor, Tensor], None], out: Tensor, value: Tensor
) -> None:
    inner = region.within(out).contiguous()
    put(inner, value)
    region.within(out).copy_(inner)
