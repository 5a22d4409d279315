"""Gives each example its own copy of a parameter, or of what is made of parameters alone.

With a copy for each example any function of torch can be called as it is: the gradient that comes
back to the copies is that of each example. A parameter that is broadcast costs no memory for it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.autocast import is_autocast_enabled
from pycoherence.capture.context import CallContext
from pycoherence.capture.derived import Derived
from pycoherence.capture.dimensions import PERMUTATIONS
from pycoherence.capture.facts import (
    CONSTANT,
    EXAMPLES,
    MIXED,
    PARAMETERS,
    SHARED,
    Ids,
    Lost,
    Owner,
    Regular,
    along,
    ids_of,
    is_place,
    join_along,
    place_of,
    recognise,
    regular_at,
    tensors,
)
from pycoherence.capture.groups import Groups
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.propagation import dims_of_owner, identity, ids_like
from pycoherence.capture.rows import Rows, rows_of
from pycoherence.capture.rules import ELEMENTWISE, MOVEMENT, VIEW, rule_of
from pycoherence.capture.sharded import Cuts
from pycoherence.errors import UnsupportedError
from pycoherence.sites import AffineSite, Site, of_rows


class Broadcast(LayerRule):
    """`p.expand(shape)`, which does not vary along the dimension of the examples."""

    cuts = Cuts(((0,),))

    def __init__(self, shape: tuple[int, ...], order: list[int], kept: int) -> None:
        self._shape, self._order, self._kept = shape, order, kept

    def forward(self, p: Tensor) -> tuple[Tensor, Kept]:
        self._parameter = tuple(p.shape)
        return p.expand(self._shape), ()

    def input_grads(self, needed: Sequence[bool], g: Any, *kept: Any) -> Sequence[Tensor | None]:
        return ()

    def factors(self, rows: Rows, g: Tensor) -> Sequence[Site | None]:
        rows_first = rows(g.permute(self._order))
        size = prod(rows_first.shape[2:])
        flat = rows_first.reshape(*rows_first.shape[:2], size)
        if flat.is_complex():
            return (of_rows(flat.sum(1).view(len(flat), *self._parameter)),)
        return (AffineSite(flat, shape=self._parameter),)


class Moved(LayerRule):
    """A movement of the elements of `p`, after which each belongs to one example.

    The gradient of an example is the sum over its elements, put back where they came from.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        index: Tensor,
        ids: Tensor,
        groups: Groups,
        device: torch.device,
        refuse: Callable[[], Any],
    ) -> None:
        self._function, self._count, self._refuse = function, groups.count, refuse
        single = (ids >= 0) & (ids < MIXED) & (index >= 0)
        places = single.flatten().nonzero().flatten()
        others = (~single & (index >= 0)).flatten().nonzero().flatten()
        found = places, others, index.flatten()[places], groups.of(ids.flatten()[places])
        # Copied to the GPU once, here: a CUDA graph cannot hold copies from the host.
        self._places, self._others, self._index, self._ids = (
            x.to(device, non_blocking=True) for x in found
        )

    def forward(self, p: Tensor) -> tuple[Tensor, Kept]:
        self._shape = tuple(p.shape)
        found = self._function(p)
        return found.clone() if found._is_view() or found is p else found, ()

    def input_grads(self, needed: Sequence[bool], g: Any, *kept: Any) -> Sequence[Tensor | None]:
        return ()

    def factors(self, rows: Rows, g: Tensor) -> Sequence[Site | None]:
        flat = g.reshape(-1)
        if len(self._others) and bool((flat[self._others] != 0).any()):
            self._refuse()
        size = prod(self._shape)
        total = flat.new_zeros(self._count * size)
        to = self._ids * size + self._index
        # Accumulating in a fixed order, on every device.
        total.index_put_((to,), flat[self._places], accumulate=True)
        return (of_rows(total.view(self._count, *self._shape)),)


def spread(c: CallContext, p: Tensor, shape: tuple[int, ...], owner: Owner) -> Tensor:
    """`p`, broadcast to a shape, with each element being that of its example.

    Args:
        c: The capture.
        p: A parameter, or what is made of some.
        shape: The shape that `p` broadcasts to.
        owner: Whose each element of the shape is.

    Raises:
        UnsupportedError: It is not known whose.
    """
    if isinstance(owner, Lost):
        c.refuse_lost(owner, torch.empty(()).expand(shape))
    c.settle(owner, torch.empty(()).expand(shape))
    more = len(shape) - p.dim()
    varying = dims_of_owner(owner, shape)
    own = [d for d in varying if d >= more and p.shape[d - more] != 1]
    if not own:
        return _broadcast(c, p, shape, owner)
    target = [
        shape[d] if d in varying or (d >= more and p.shape[d - more] != 1) else 1
        for d in range(min([more, *varying]), len(shape))
    ]
    if target != list(p.shape):
        p = c.dispatch(Tensor.expand, (p, *target), {})
    return promote(c, p, _restricted(owner, shape, p))


def _restricted(owner: Owner, shape: tuple[int, ...], p: Tensor) -> Owner:
    """An owner of a shape, on the last dimensions of it that a tensor has."""
    own = tuple(p.shape)
    if isinstance(owner, Regular):
        if owner.count == 1 or own == shape:
            return owner
        place = along(shape, owner)
        if place is not None:
            d, inner = place
            return regular_at(own, d - (len(shape) - len(own)), inner, owner.count)
    ids = ids_of(owner, shape, p.device)
    ids = ids.reshape(ids.shape[len(shape) - len(own) :])
    return Ids(ids, owner.count)


def _broadcast(c: CallContext, p: Tensor, shape: tuple[int, ...], owner: Owner) -> Tensor:
    more = len(shape) - p.dim()
    kept = [d for d in range(len(shape)) if d >= more and p.shape[d - more] != 1]
    order = [d for d in range(len(shape)) if d not in kept] + kept
    permuted = tuple(shape[d] for d in order)
    moved = _permuted_owner(owner, shape, order, permuted, p.device)
    rows = rows_of(permuted, moved, len(kept), c.groups, p.device, c.function_name)
    assert rows is not None
    found = c.apply(Broadcast(shape, order, len(kept)), _in_order(rows, order), (), (p,))
    c.mark(found, owner)
    return found


class _InOrder:
    """An arrangement of rows that checks a gradient in another order of dimensions."""

    def __init__(self, rows: Rows, order: list[int]) -> None:
        self.dims, self._rows, self._order = rows.dims, rows, order

    def __call__(self, t: Tensor) -> Tensor:
        return self._rows(t)

    @property
    def check(self) -> Callable[[Tensor], None] | None:
        return None if self._rows.check is None else self._check

    def _check(self, g: Tensor) -> None:
        assert self._rows.check is not None
        self._rows.check(g.permute(self._order))


def _in_order(rows: Rows, order: list[int]) -> Rows:
    return rows if order == sorted(order) else _InOrder(rows, order)


def _permuted_owner(
    owner: Owner,
    shape: tuple[int, ...],
    order: list[int],
    permuted: tuple[int, ...],
    device: torch.device,
) -> Owner:
    if isinstance(owner, Regular):
        if owner.count == 1 or order == sorted(order):
            return owner
        place = along(shape, owner)
        if place is not None:
            return regular_at(permuted, order.index(place[0]), place[1], owner.count)
    return Ids(ids_of(owner, shape, device).permute(order), owner.count)


def promote(c: CallContext, p: Tensor, owner: Owner) -> Tensor:
    """Turn what is made of parameters alone into a tensor of examples, element by element.

    A tensor made by known functions is made again from copies for each example, which are taken as
    early as possible: learned queries that were expanded over the batch and went through layers go
    through captured layers the second time.
    """
    c.settle(owner, p)
    derived = c.facts(p).derived
    if derived is not None:
        for known, found in derived.promoted:
            if same_owner(known, owner, p):
                return found
        found = _made_again(c, p, derived, owner)
        if found is not None:
            derived.promoted.append((owner, found))
            return found
    ids = ids_like(p, owner, place_of([owner]))
    index = torch.arange(p.numel(), device=ids.device).view(p.shape)
    found = _moved(c, lambda x: x, p, index, ids, owner)
    if derived is not None:
        derived.promoted.append((owner, found))
    return found


def same_owner(a: Owner, b: Owner, x: Tensor) -> bool:
    """Whether two owners of a tensor say the same."""
    if isinstance(a, Lost) or isinstance(b, Lost):
        return False
    if type(a) is type(b) is Regular and a == b:
        return True
    device = place_of([a, b])
    return bool((ids_like(x, a, device) == ids_like(x, b, device)).all())


def _moved(
    c: CallContext,
    function: Callable[[Tensor], Tensor],
    p: Tensor,
    index: Tensor,
    ids: Tensor,
    owner: Owner,
) -> Tensor:
    name = c.function_name

    def refuse() -> None:
        raise UnsupportedError(
            f"{name}: a gradient arrives at elements of which no single example is the owner. What "
            "to do: keep examples apart until the loss is taken, or freeze the parameter with "
            "requires_grad_(False)."
        )

    rule = Moved(function, index, ids, c.groups, p.device, refuse)
    found = c.apply(rule, None, (), (p,))
    c.mark(found, owner)
    return found


def _made_again(c: CallContext, p: Tensor, derived: Derived, owner: Owner) -> Tensor | None:
    """Follow a recipe with copies for each example; `None` if the result is not the same."""
    recipe = derived.recipe
    if recipe is None or not recipe.holds(derived.source) or is_autocast_enabled():
        return None
    func, args, kwargs, at = recipe.function, recipe.args, recipe.kwargs, recipe.at
    rule = rule_of(func)
    moves = rule.kind in (VIEW, MOVEMENT) or rule.name in PERMUTATIONS
    try:
        if moves:
            found = _moved_again(c, p, func, args, kwargs, owner, at)
        elif rule.kind == ELEMENTWISE or rule.dimensions is not None:
            found = _computed_again(c, p, func, args, kwargs, owner, at)
        else:
            return None
    except UnsupportedError:
        return None
    if found is None or found.shape != p.shape or found.dtype != p.dtype:
        return None
    facts = c.facts(found)
    return found if facts.kind == EXAMPLES and same_owner(facts.owner, owner, p) else None


def _moved_again(
    c: CallContext, p: Tensor, func: Any, args: Any, kwargs: Any, owner: Owner, at: int
) -> Tensor | None:
    parents = [x for x in tensors((args, kwargs)) if c.facts(x).kind == PARAMETERS]
    if len(parents) != len({id(x) for x in parents}) or not parents:
        return None
    device = place_of([owner], filter(is_place, tensors((args, kwargs))))
    ids = ids_like(p, owner, device).flatten()
    new: dict[int, Tensor] = {}
    for parent in parents:
        index = _index_of(func, args, kwargs, parent, at, device).flatten()
        if len(index) != len(ids):
            return None
        used = index >= 0
        size = parent.numel()
        low = torch.full((size,), MIXED, dtype=torch.int64, device=device)
        low.scatter_reduce_(0, index[used], ids[used].where(ids[used] != SHARED, MIXED), "amin")
        high = torch.full((size,), SHARED, dtype=torch.int64, device=device)
        high.scatter_reduce_(0, index[used], ids[used], "amax")
        shared = (high != low) & (high != SHARED)
        if not bool(shared.any()) and c.facts(parent).derived is not None:
            mine = recognise(
                high.view(parent.shape), tuple(parent.shape), owner.count, c.function_name
            )
            if mine is None or isinstance(mine, Lost):
                return None
            new[id(parent)] = promote(c, parent, mine)
        elif len(parents) > 1:
            return None
        elif func in (Tensor.expand, Tensor.expand_as, torch.broadcast_to) and not _varies(
            owner, p, parent
        ):
            return _broadcast(c, parent, tuple(p.shape), owner)
        else:

            def run(x: Tensor, key: int = id(parent)) -> Tensor:
                new = {key: x}
                return tensors(func(*replaced(args, new), **replaced(kwargs, new)))[at]

            return _moved(c, run, parent, index.view(p.shape), ids.view(p.shape), owner)
    return tensors(c.dispatch(func, replaced(args, new), replaced(kwargs, new)))[at]


def _varies(owner: Owner, p: Tensor, parent: Tensor) -> bool:
    more = p.dim() - parent.dim()
    varying = dims_of_owner(owner, tuple(p.shape))
    return any(d >= more and parent.shape[d - more] != 1 for d in varying)


def _index_of(
    func: Any, args: Any, kwargs: Any, parent: Tensor, at: int, device: torch.device
) -> Tensor:
    """Which element of a tensor each one of a movement's result is; -1 for those of others."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value is parent:
                numbers = torch.arange(1, value.numel() + 1, device=device)
                return numbers.double().view(value.shape)
            if value.is_floating_point() or value.is_complex():
                return torch.zeros(value.shape, dtype=torch.float64, device=device)
            return value
        if isinstance(value, tuple):
            return tuple(change(item) for item in value)
        if isinstance(value, list):
            return [change(item) for item in value]
        if isinstance(value, dict):
            return {name: change(item) for name, item in value.items()}
        return value

    with torch.no_grad():
        return tensors(func(*change(args), **change(kwargs)))[at].long() - 1


def _computed_again(
    c: CallContext, p: Tensor, func: Any, args: Any, kwargs: Any, owner: Owner, result: int
) -> Tensor | None:
    rule = rule_of(func)
    each = tensors((args, kwargs))
    if rule.dimensions is not None:
        places = {id(x): at for x, at in rule.dimensions(args, kwargs, p)}
    else:
        places = {id(x): identity(x, p) for x in each}
    varying = dims_of_owner(owner, tuple(p.shape))
    new: dict[int, Tensor] = {}
    for x in each:
        at = places.get(id(x))
        if at is None or id(x) in new:
            continue
        mine = [d for d, to in enumerate(at) if to in varying and x.shape[d] == p.shape[to]]
        if not mine:
            continue
        if len(mine) != len(varying):
            return None
        own = _owner_before(owner, p, x, at)
        if own is None:
            return None
        kind = c.facts(x).kind
        if kind == PARAMETERS:
            new[id(x)] = promote(c, x, own)
        elif kind == CONSTANT:
            new[id(x)] = alias = x.view_as(x)  # with its gradient, if it is an input that has one
            c.mark(alias, own)
        else:
            return None
    if not new:
        return None
    return tensors(c.dispatch(func, replaced(args, new), replaced(kwargs, new)))[result]


def _owner_before(owner: Owner, p: Tensor, x: Tensor, at: Sequence[int]) -> Owner | None:
    """The owner of an argument, from that of the result."""
    shape = tuple(x.shape)
    if isinstance(owner, Regular):
        place = along(tuple(p.shape), owner)
        if place is None:
            return owner if shape == tuple(p.shape) else None
        d, inner = place
        return regular_at(shape, list(at).index(d), inner, owner.count)
    if isinstance(owner, Lost):
        return None
    ids = owner.ids
    kept = [to for to in at if to >= 0]
    ids = join_along(ids, [d for d in range(ids.dim()) if d not in kept])
    ids = ids.permute((*kept, *[d for d in range(ids.dim()) if d not in kept]))
    ids = ids.reshape([ids.shape[i] for i in range(len(kept))])
    size, i = [1] * x.dim(), 0
    for d, to in enumerate(at):
        if to >= 0:
            size[d] = ids.shape[i]
            i += 1
    return recognise(ids.view(size), shape, owner.count, "")


def replaced(value: Any, new: dict[int, Tensor]) -> Any:
    """Nested arguments with some tensors replaced, by their ids."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, tuple):
        return tuple(replaced(item, new) for item in value)
    if isinstance(value, list):
        return [replaced(item, new) for item in value]
    if isinstance(value, dict):
        return {name: replaced(item, new) for name, item in value.items()}
    return value
