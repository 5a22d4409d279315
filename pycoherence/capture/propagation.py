"""From the owners of a function's arguments to those of its results.

Three kinds of rules describe torch's functions. A *view* keeps the flattened order, and so every
owner. A *movement* takes elements elsewhere, so that the same function is run on their ids.
Everything else is told by its dimensions: which dimension of the result each dimension of an
argument becomes, or that its elements are joined (`JOINED`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.facts import (
    MIXED,
    SHARED,
    Ids,
    Lost,
    Owner,
    Regular,
    along,
    ids_of,
    is_place,
    join,
    join_along,
    place_of,
    recognise,
    regular_at,
    tensors,
)

JOINED = -1
"""The place of a dimension whose elements a function joins."""

Places = Sequence[int]
"""The dimension of the result that each dimension of an argument becomes, or `JOINED`."""

Owned = tuple[Tensor, Owner]
"""A tensor of examples, and its owner."""


def identity(x: Tensor, result: Tensor) -> Places:
    """Dimensions that stay, counted from the last one, as broadcasting has them."""
    more = result.dim() - x.dim()
    return range(more, more + x.dim())


def dims_of_owner(owner: Owner, shape: tuple[int, ...]) -> list[int]:
    """The dimensions along which an owner varies."""
    if isinstance(owner, Ids):
        return [d for d, n in enumerate(owner.ids.shape) if n > 1]
    if isinstance(owner, Lost) or owner.count == 1 or 0 in shape:
        return []
    place = along(shape, owner)
    if place is not None:
        return [place[0]]
    return [d for d, n in enumerate(shape) if n > 1]


def joined(
    owned: Sequence[tuple[Tensor, Owner, Places]], result: Tensor, function: str
) -> Owner | None:
    """The owner of a result whose dimensions are told; `None` if it is of no example."""
    shape = tuple(result.shape)
    first = owned[0][1]
    count = first.count
    if count == 1:
        return next((o for _, o, _ in owned if isinstance(o, Lost)), Regular(1, 1))
    found: Owner | None = None
    for x, owner, places in owned:
        one = _one(tuple(x.shape), owner, places, shape, function)
        if one is None:
            return _by_ids(owned, shape, count, function)
        if isinstance(one, Lost):
            return one
        if found is not None and one != found:
            # They may agree all the same, as far as elements of no example go.
            return _by_ids(owned, shape, count, function)
        found = one
    return found


def _one(
    shape: tuple[int, ...],
    owner: Owner,
    places: Places,
    result: tuple[int, ...],
    function: str,
) -> Owner | None:
    """The owner of a result from that of one argument; `None` if it takes ids to tell."""
    if isinstance(owner, Lost):
        return owner
    if isinstance(owner, Ids):
        return None
    place = along(shape, owner)
    if place is None:
        return None
    d, inner = place
    to = places[d]
    if to == JOINED:
        return Lost(function, mixed=True, count=owner.count) if shape[d] > 1 else None
    if result[to] != shape[d]:
        return None
    return regular_at(result, to, inner, owner.count)


def _by_ids(
    owned: Sequence[tuple[Tensor, Owner, Places]],
    shape: tuple[int, ...],
    count: int,
    function: str,
) -> Owner | None:
    total: Tensor | None = None
    device = place_of(owner for _, owner, _ in owned)
    for x, owner, places in owned:
        ids = ids_of(owner, tuple(x.shape), device)
        ids = join_along(ids, [d for d, to in enumerate(places) if to == JOINED])
        kept = [d for d, to in enumerate(places) if to != JOINED]
        order = sorted(kept, key=lambda d, places=places: places[d])
        gone = [d for d in range(ids.dim()) if d not in kept]
        ids = ids.permute((*order, *gone)).reshape([ids.shape[d] for d in order])
        size = [1] * len(shape)
        for i, d in enumerate(order):
            size[places[d]] = ids.shape[i]
        ids = ids.view(size)
        total = ids if total is None else join(total, ids)
    assert total is not None
    return recognise(total, shape, count, function)


def moved(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    owners: Mapping[int, Owner],
    results: Sequence[Tensor],
    name: str,
    count: int,
) -> list[Owner | None]:
    """The owners of what a movement gives: the function is run on the ids of the elements.

    Args:
        function: It takes elements elsewhere, repeats, leaves out, or puts constants between them.
        args: Its arguments, positional.
        kwargs: Its arguments by name.
        owners: By `id` of a tensor among the arguments.
        results: Its results.
        name: Name of the function, for messages.
        count: How many examples there are.
    """
    if count == 1:
        lost = next((o for o in owners.values() if isinstance(o, Lost)), None)
        return [lost or Regular(1, 1) for _ in results]
    if any(isinstance(o, Lost) for o in owners.values()):
        lost = next(o for o in owners.values() if isinstance(o, Lost))
        return [lost for _ in results]
    found = _run_on_ids(function, args, kwargs, owners)
    return [
        recognise(ids, tuple(x.shape), count, name) for ids, x in zip(found, results, strict=True)
    ]


def ids_like(x: Tensor, owner: Owner | None, device: torch.device | None = None) -> Tensor:
    """The example of each element, in full; on the tensor's device or another."""
    shape, device = tuple(x.shape), device or x.device
    if owner is None:
        return torch.full(shape, SHARED, dtype=torch.int64, device=device)
    return ids_of(owner, shape, device).expand(shape).contiguous()


def _run_on_ids(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    owners: Mapping[int, Owner],
) -> list[Tensor]:
    """Call a movement of ids: floating tensors become ids, indices and masks stay.

    The ids are raised by one and are floating numbers: torch fills with zeros, which then mean
    elements of no example, and some functions take no integers. `MIXED` is exact in float64.
    """
    # Integers are ids of words if they are moved, and places if they say where to.
    moved = [args[:1], *(kwargs.get(name) for name in ("input", "src", "source", "values"))]
    moved += [args[at : at + 1] for at in _VALUES.get(function.__name__, ())]
    moves = {id(x) for x in tensors(moved)}
    places = [x for x in tensors((args, kwargs)) if is_place(x) and id(x) not in moves]
    device = place_of(owners.values(), places)

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            if is_place(value) and id(value) not in moves:
                return value
            return (ids_like(value, owners.get(id(value)), device) + 1).double()
        if isinstance(value, tuple):
            return tuple(change(item) for item in value)
        if isinstance(value, list):
            return [change(item) for item in value]
        if isinstance(value, float):
            return 0.0  # what is filled in
        return value

    with torch.no_grad():
        found = function(*change(args), **{name: change(v) for name, v in kwargs.items()})
        return [x.long() - 1 for x in tensors(found)]


_VALUES = {
    "_set": (2,),
    "index_put": (2,),
    "masked_scatter": (2,),
    "scatter": (3,),
    "index_copy": (3,),
    "select_scatter": (1,),
    "slice_scatter": (1,),
    "diagonal_scatter": (1,),
}
"""Which arguments of a movement are values, beside the first."""


def added(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], owners: Mapping[int, Owner]
) -> Tensor | None:
    """The ids of what a function gives that adds elements up in places it is told.

    Args:
        name: `index_add`, `scatter_add`, `index_reduce`, `scatter_reduce` or `index_put`.
        args: Positional arguments.
        kwargs: Arguments by name.
        owners: By `id` of a tensor among the arguments.
    """
    bound: dict[str, Any] = dict(zip(("self", "dim", "index", "source"), args, strict=False))
    aliases = {"src": "source", "input": "self"}
    bound |= {aliases.get(name, name): value for name, value in kwargs.items()}
    into, index = bound["self"], bound["index"]
    source = bound.get("source")
    if not isinstance(source, Tensor):
        return None
    ids = ids_like(into, owners.get(id(into))).double()
    new = ids_like(source, owners.get(id(source))).double()
    dim = bound["dim"] % max(1, into.dim())
    if name.startswith("index"):
        size = [1] * into.dim()
        size[dim] = -1
        index = index.view(size).expand(new.shape)
    lowered = [torch.where(x == SHARED, float(MIXED), x) for x in (ids, new)]
    high = ids.scatter_reduce(dim, index, new, "amax")
    low = lowered[0].scatter_reduce(dim, index, lowered[1], "amin")
    return torch.where((high == low) | (high == SHARED), high, float(MIXED)).long()
