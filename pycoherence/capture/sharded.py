"""Calls whose tensors are distributed over ranks (`DTensor`), as tensor parallelism makes them.

The function itself and the gradient of its input run on distributed tensors. Its factors are
taken apart here: a parameter that is cut along one dimension takes the factors that are cut
likewise, which is how they lie already in layers that are parallel by columns or by rows, so that
nothing is communicated.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycoherence.capture.facts import (
    CONSTANT,
    EXAMPLES,
    Facts,
    FactTable,
    Ids,
    Lost,
    Owner,
    Regular,
    along,
    regular_at,
    tensors,
)
from pycoherence.capture.rows import First
from pycoherence.capture.torch_internals import before_distribution, is_leaf_of, slice_of
from pycoherence.capture.uses import LayerCall
from pycoherence.sites import (
    EmbeddingSite,
    Layout,
    ShardedSite,
    Site,
    gathered,
    is_dtensor,
    local_part,
    of_rows,
    waited,
)


class Cuts(NamedTuple):
    """How the factors of a rule are cut where a parameter is.

    Attributes:
        uses: For each argument, the tensors that its site is made of: 0 is the output gradient, 1
            the first that the rule keeps. `factors` gets `None` for others.
        by: For an argument and a dimension of it along which it may be cut, the tensors that then
            are cut too, and along which dimension.
    """

    uses: tuple[tuple[int, ...], ...]
    by: Mapping[tuple[int, int], Mapping[int, int]] = MappingProxyType({})


def layouts_of(
    call: LayerCall, values: Sequence[Any], found: Any
) -> Sequence[Layout | None] | None:
    """How the parameter arguments of a call are distributed; `None` if all its tensors are plain.

    Args:
        call: The call.
        values: Its inputs and parameters.
        found: Its result.
    """
    if not any(is_dtensor(x) or waited(x) is not x for x in (*tensors(found), *tensors(values))):
        return None
    layouts = [Layout.of(x) for x in values[call.inputs :]]
    for argument, layout in zip(call.arguments, layouts, strict=True):
        if argument is not None and layout is not None:
            layout.expect_known(call.names)
    return layouts


def sharded_factors(
    call: LayerCall, layouts: Sequence[Layout | None], g: Any, kept: Sequence[Tensor | None]
) -> list[Site | None]:
    """The sites of a call whose tensors are distributed, in the order of its arguments."""
    values = _Values(call, g, kept)
    if call.rows is not None and call.rows.check is not None:
        call.rows.check(call.rule.rows_first(values.whole_gradient()))
    sites: list[Site | None] = []
    for i, (argument, layout) in enumerate(zip(call.arguments, layouts, strict=True)):
        sites.append(None if argument is None else values.site(i, layout))
    return sites


class _Values:
    """The tensors of a call in its backward pass."""

    def __init__(self, call: LayerCall, g: Any, kept: Sequence[Tensor | None]) -> None:
        self._rule, self._rows = call.rule, call.rows
        self._g = g
        self._cuts: Cuts | None = call.rule.cuts
        self._kept = kept
        self._found: dict[Any, Sequence[Site | None]] = {}

    def whole_gradient(self) -> Any:
        """The output gradient on each rank."""
        return _each(gathered, self._g)

    def site(self, i: int, layout: Layout | None) -> Site | None:
        """The site of an argument that is distributed in this way."""
        if layout is None:
            return self._whole(i)
        cuts = {} if self._cuts is None else self._cuts.by
        if not layout.cuts:
            site = self._summed(i, layout) or self._whole(i)
        elif all((i, d) in cuts for _, d in layout.cuts):
            site = self._cut(i, layout, [cuts[i, d] for _, d in layout.cuts])
        else:
            site = _slice(self._whole(i), layout)
        return None if site is None else ShardedSite(site, layout)

    def _whole(self, i: int) -> Site | None:
        """The site of a whole parameter."""
        return self._factors(i, "whole", lambda _, x: gathered(x))[i]

    def _cut(self, i: int, layout: Layout, cuts: Sequence[Mapping[int, int]]) -> Site | None:
        """The site of a slice, from factors that are cut.

        Args:
            i: The argument.
            layout: How the parameter is distributed.
            cuts: For each dimension of the mesh over which it is cut, the factors that are.
        """
        from torch.distributed.tensor import Replicate, Shard

        by_dim = {m: cut for (m, _), cut in zip(layout.cuts, cuts, strict=True)}

        def part(place: int, x: Tensor) -> Tensor:
            placements = [
                Shard(by_dim[m][place] % x.dim()) if place in by_dim.get(m, ()) else Replicate()
                for m in range(layout.mesh.ndim)
            ]
            return local_part(x, layout.mesh, placements)

        return self._factors(i, str(by_dim), part)[i]

    def _summed(self, i: int, layout: Layout) -> Site | None:
        """The site of a scale or a shift whose positions are cut, by sums over the ranks.

        A row of so many numbers as the parameter has is less to send than all positions are.

        Returns:
            `None` if positions are not cut, or something else is.
        """
        if self._cuts is None or self._cuts.by or not is_dtensor(self._g) or self._rows is None:
            return None
        placements, shape = tuple(self._g.placements), tuple(self._g.shape)
        cut = [p for p in placements if not p.is_replicate()]
        n = self._rows.dims
        if not cut or type(self._rows) is not First:
            return None
        if not all(p.is_shard() and 0 < p.dim < n for p in cut):  # pyright: ignore
            return None

        def part(place: int, x: Tensor) -> Tensor:
            if tuple(x.shape[:n]) != shape[:n]:
                return gathered(x)
            return local_part(x, layout.mesh, placements)

        site = self._factors(i, "positions", part)[i]
        if site is None:
            return None
        rows = site.rows()
        for m, p in enumerate(placements):
            if p.is_shard():
                torch.distributed.all_reduce(rows, group=layout.mesh.get_group(m))
        return of_rows(rows)

    def _factors(
        self, i: int, key: str, change: Callable[[int, Tensor], Tensor]
    ) -> Sequence[Site | None]:
        """The sites from tensors that are made plain, each by its place; that of `i` is right."""
        places = range(1 + len(self._kept)) if self._cuts is None else self._cuts.uses[i]
        known = (key, *places)
        found = self._found.get(known)
        if found is None:
            g = _each(lambda x: change(0, x), self._g)
            kept = [
                change(place, x) if x is not None and place in places else None
                for place, x in enumerate(self._kept, 1)
            ]
            found = self._found[known] = self._rule.factors(self._rows, g, *kept)
        return found


def _each(change: Callable[[Tensor], Tensor], g: Any) -> Any:
    """Change a gradient, or each of several."""
    if type(g) is tuple:
        return tuple(None if x is None else change(x) for x in g)
    return change(g)


def _slice(site: Site | None, layout: Layout) -> Site | None:
    """The site of this rank's slice, from that of the whole parameter."""
    if site is None:
        return None
    if isinstance(site, EmbeddingSite) and {d for _, d in layout.cuts} == {0}:
        return site.narrowed(*layout.span(0))
    return of_rows(layout.slice(site.rows(), 1))


def carried(x: Tensor, table: FactTable) -> Facts | None:
    """The facts of a tensor that was distributed, or made local, where no mode sees it.

    They are those of the tensor that it was made of, which may be gone by now; the graph knows.

    Args:
        x: A tensor of unknown facts.
        table: Those of the block.

    Returns:
        `None` if it was made in another way.
    """
    found = _source_of(x, table)
    if found is None:
        return None
    facts, shape = found
    if facts.kind != EXAMPLES:
        return facts if facts.kind == CONSTANT else None
    owner = _owner_of(facts.owner, shape, tuple(x.shape))
    if isinstance(owner, Lost) and facts.soft and x.grad_fn is None:
        return None  # such as rows of a batch that one rank has got
    return Facts(EXAMPLES, owner, soft=facts.soft)


def _source_of(x: Tensor, table: FactTable) -> tuple[Facts, tuple[int, ...]] | None:
    """The facts of the tensor that one was made of, and its shape."""
    if x.grad_fn is None:
        local = slice_of(x) if is_dtensor(x) else None
        if type(local) is not Tensor:
            return None
        for y, facts in table.alive():
            same = type(y) is Tensor and y.shape == local.shape and y.dtype == local.dtype
            if same and y.data_ptr() == local.data_ptr():
                return facts, tuple(y.shape)
        return None
    node, output = before_distribution(x.grad_fn, x.output_nr)
    if node is x.grad_fn or node is None:
        return None
    known = table.recall(node, output)
    if known is not None:
        return known
    for y, facts in table.alive():
        if is_leaf_of(y, node) or (y.grad_fn is node and y.output_nr == output):
            return facts, tuple(y.shape)
    return None


def _owner_of(owner: Owner, shape: tuple[int, ...], now: tuple[int, ...]) -> Owner:
    """An owner of a tensor that is cut, or put together, along a dimension of its own."""
    if shape == now or isinstance(owner, Lost) or (isinstance(owner, Regular) and owner.count == 1):
        return owner
    lost = Lost("cutting it over the ranks (DTensor)", mixed=False, count=owner.count)
    if len(shape) != len(now):
        return lost
    if isinstance(owner, Ids):
        varying = [d for d, n in enumerate(owner.ids.shape) if n > 1]
        return owner if all(shape[d] == now[d] for d in varying) else lost
    place = along(shape, owner)
    if place is None:
        return lost
    d, inner = place
    if shape[d] == now[d]:
        return regular_at(now, d, inner, owner.count)
    # Some examples are on one rank, and others on others.
    if shape[d] != inner * owner.count or now[d] % inner:
        return lost
    return regular_at(now, d, inner, now[d] // inner)


__all__ = ["Cuts", "carried", "layouts_of", "sharded_factors"]
