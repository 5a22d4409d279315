"""The owners of a function's results, by the rule that describes it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.dimensions import given, main
from pycoherence.capture.errors import function_name
from pycoherence.capture.facts import (
    MIXED,
    Facts,
    Ids,
    Lost,
    Owner,
    Regular,
    join,
    join_along,
    place_of,
    recognise,
    tensors,
)
from pycoherence.capture.propagation import (
    JOINED,
    added,
    dims_of_owner,
    identity,
    ids_like,
    joined,
    moved,
)
from pycoherence.capture.rules import (
    ADDING,
    DIMENSIONS,
    ELEMENTWISE,
    JOINING,
    MOVEMENT,
    UNKNOWN,
    VIEW,
    Rule,
)

Owned = Sequence[tuple[Tensor, Facts]]
_FIRST_ONLY = frozenset(("tril", "triu", "scatter"))


def owners_of(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    owned: Owned,
    results: Sequence[Tensor],
) -> list[Owner | None]:
    """The owner of each result; `None` for one in which no example has a part.

    An owner that is only a default gives way if it disagrees with one that is certain.
    """
    if len({f.owner.count for _, f in owned}) > 1:
        # One row is the same for all, and a batch is what has more dimensions.
        voters = [x for x in owned if not x[1].soft] or [x for x in owned if x[1].owner.count > 1]
        first = max(voters or owned, key=lambda x: x[0].dim())[1].owner.count
        owned = [(x, f) for x, f in owned if not f.soft or f.owner.count == first]
    firm = [(x, f) for x, f in owned if not f.soft]
    found = _owners(func, args, kwargs, rule, owned, results)
    if rule.name in JOINING and firm and len(firm) < len(owned):
        # The first dimension of a tensor from outside is the batch by default only.
        varying = {dims_of(x, f.owner) for x, f in firm}
        agreeing = [(x, f) for x, f in owned if not f.soft or dims_of(x, f.owner) in varying]
        return _owners(func, args, kwargs, rule, agreeing, results)
    if rule.kind in (MOVEMENT, VIEW) or len(firm) == len(owned):
        return found
    if any(_is_mixed(o) for o in found):
        if firm:
            return _owners(func, args, kwargs, rule, firm, results)
        if len(owned) > 1:
            most = max(x.dim() for x, _ in owned)
            leading = [(x, f) for x, f in owned if x.dim() == most][:1]
            return _owners(func, args, kwargs, rule, leading, results)
    return found


def dims_of(x: Tensor, owner: Owner) -> tuple[int, ...]:
    """The dimensions along which an owner varies, counted from the last one."""
    return tuple(d - x.dim() for d in dims_of_owner(owner, tuple(x.shape)))


def _is_mixed(owner: Owner | None) -> bool:
    """Whether several examples have a part in some elements, or it is not known."""
    if isinstance(owner, Ids):
        return bool((owner.ids == MIXED).any())
    return isinstance(owner, Lost)


def _owners(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    owned: Owned,
    results: Sequence[Tensor],
) -> list[Owner | None]:
    name = function_name(func)
    counts = {f.owner.count for _, f in owned}
    if len(counts) > 1:
        return [Lost(name, mixed=True, count=max(counts)) for _ in results]
    (count,) = counts
    if count == 1:
        lost = next((f.owner for _, f in owned if isinstance(f.owner, Lost)), None)
        return [lost or Regular(1, 1) for _ in results]
    by_id = {id(x): f.owner for x, f in owned}
    if rule.kind == VIEW and len(results) > 1:
        return [Lost(name, mixed=False, count=count) for _ in results]
    if rule.kind == VIEW:
        return [_viewed(owned[0], y, name) for y in results]
    if rule.kind == ELEMENTWISE:
        if rule.name == "copy" and id(args[1]) in by_id:
            owned = [(x, f) for x, f in owned if x is args[1]]
        return [_joined([(x, f.owner, identity(x, y)) for x, f in owned], y, name) for y in results]
    if rule.dimensions is not None:
        return [_by_dimensions(args, kwargs, rule, by_id, y, name, count) for y in results]
    if rule.kind == ADDING or (rule.name == "index_put" and given(args, kwargs, 3, "accumulate")):
        ids = None if rule.name == "index_put" else added(rule.name, args, kwargs, by_id)
        if ids is None:
            return [Lost(name, mixed=False, count=count) for _ in results]
        return [recognise(ids, tuple(y.shape), count, name) for y in results]
    if rule.kind == MOVEMENT:
        return _moved(func, args, kwargs, rule, by_id, results, name, count)
    return [Lost(name, mixed=False, count=count) for _ in results]


def _joined(each: Sequence[Any], result: Tensor, name: str) -> Owner | None:
    if any(x.dim() > result.dim() for x, _, _ in each):
        return Lost(name, mixed=False, count=each[0][1].count)
    return joined(each, result, name)


def _viewed(one: tuple[Tensor, Facts], result: Tensor, name: str) -> Owner | None:
    x, facts = one
    owner = facts.owner
    if isinstance(owner, Lost):
        return owner
    if isinstance(owner, Ids):
        if x.numel() != result.numel():
            return Lost(name, mixed=False, count=owner.count)
        ids = ids_like(x, owner).reshape(result.shape)
        return recognise(ids, tuple(result.shape), owner.count, name)
    if x.numel() == result.numel() or not x.numel():
        return owner
    # Bytes seen as another dtype: the flattened order stays, in other units.
    stride = owner.stride * result.numel()
    if stride % x.numel():
        return Lost(name, mixed=False, count=owner.count)
    return Regular(stride // x.numel(), owner.count)


def _by_dimensions(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    by_id: Mapping[int, Owner],
    result: Tensor,
    name: str,
    count: int,
) -> Owner | None:
    assert rule.dimensions is not None
    places = rule.dimensions(args, kwargs, result)
    each = [(x, by_id[id(x)], p) for x, p in places if id(x) in by_id]
    if {id(x) for x, _, _ in each} != set(by_id) or not each:
        return Lost(name, mixed=False, count=count)
    if any(to >= result.dim() or to < JOINED for _, _, p in each for to in p):
        return Lost(name, mixed=False, count=count)
    if (
        rule.name.startswith("conv")
        and rule.name != "convolution"
        and isinstance(given(args, kwargs, 6, "groups", 1), int)
    ):
        found = _grouped_conv(args, kwargs, rule, by_id, result, name, count)
        if found is not None:
            return found
    return joined(each, result, name)


def _grouped_conv(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    by_id: Mapping[int, Owner],
    result: Tensor,
    name: str,
    count: int,
) -> Owner | None:
    """A convolution by groups of channels may hold an example in each group."""
    groups = given(args, kwargs, 6, "groups", 1)
    x, weight = main(args, kwargs), given(args, kwargs, 1, "weight")
    if groups == 1 or x.dim() != weight.dim():
        return None
    total: Tensor | None = None
    device = place_of(by_id.values())
    for y, channel in ((x, 1), (weight, 0)):
        owner = by_id.get(id(y))
        if owner is None:
            continue
        ids = ids_like(y, owner, device).flatten(channel + 1)
        ids = join_along(ids, [ids.dim() - 1]).squeeze(-1)
        ids = ids.unflatten(channel, (groups, ids.shape[channel] // groups))
        ids = join_along(ids, [ids.dim() - 1]).squeeze(-1)
        ids = ids.repeat_interleave(result.shape[1] // groups, -1)
        ids = ids.view(-1, result.shape[1], *[1] * (result.dim() - 2))
        total = ids if total is None else join(total, ids)
    return None if total is None else recognise(total, tuple(result.shape), count, name)


def _moved(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    by_id: Mapping[int, Owner],
    results: Sequence[Tensor],
    name: str,
    count: int,
) -> list[Owner | None]:
    first = main(args, kwargs) if not isinstance(args[0] if args else None, (list, tuple)) else None
    if rule.name in _FIRST_ONLY and not isinstance(
        given(args, kwargs, 3, "src", kwargs.get("value")), Tensor
    ):
        # Numbers that are filled in agree with everything.
        owner = by_id.get(id(first))
        return [owner for _ in results]
    if kwargs.get("reduce") is not None:
        return [Lost(name, mixed=False, count=count) for _ in results]
    if rule.name == "setitem":
        if id(args[2]) not in by_id and id(args[0]) in by_id:
            return [by_id[id(args[0])]]
        func = _set
    elif rule.name == "pad":
        func = _pad
    elif rule.name == "broadcast_tensors":
        pairs = zip(tensors(args), results, strict=True)
        return [
            joined([(x, by_id[id(x)], identity(x, y))], y, name) if id(x) in by_id else None
            for x, y in pairs
        ]
    elif rule.name == "as_strided":
        return [_strided(args, kwargs, by_id, y, name, count) for y in results]
    values = [x for x in tensors((args[:1], kwargs.get("input"))) if id(x) in by_id]
    sources = [
        x
        for x in tensors((args[2:], kwargs.get("src"), kwargs.get("source")))
        if id(x) in by_id and (x.is_floating_point() or func is _set)
    ]
    if not values and not sources:
        return [_by_index(args, kwargs, rule, by_id, y, name, count) for y in results]
    try:
        return moved(func, args, kwargs, by_id, results, name, count)
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return [Lost(name, mixed=False, count=count) for _ in results]


def _by_index(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rule: Rule,
    by_id: Mapping[int, Owner],
    result: Tensor,
    name: str,
    count: int,
) -> Owner | None:
    """The owner of what indices of examples pick from a constant."""
    if rule.name in ("gather", "take", "take_along_dim"):
        index = given(args, kwargs, 2 if rule.name == "gather" else 1, "index")
        if isinstance(index, Tensor) and index.shape == result.shape and id(index) in by_id:
            return by_id[id(index)]
    if rule.name == "getitem":
        index = args[1]
        parts = list(index) if isinstance(index, tuple) else [index]
        ahead: list[Tensor] = []
        for part in parts:
            if not isinstance(part, Tensor) or part.dtype == torch.bool:
                break
            ahead.append(part)
        if ahead and not any(isinstance(p, (Tensor, list)) for p in parts[len(ahead) :]):
            n = max(p.dim() for p in ahead)
            each = [
                (p, by_id[id(p)], [n - p.dim() + d for d in range(p.dim())])
                for p in ahead
                if id(p) in by_id
            ]
            if each:
                return joined(each, result, name)
    if rule.name == "index_select":
        index, dim = given(args, kwargs, 2, "index"), given(args, kwargs, 1, "dim")
        if id(index) in by_id:
            return joined([(index, by_id[id(index)], [dim % result.dim()])], result, name)
    return Lost(name, mixed=False, count=count)


def _strided(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    by_id: Mapping[int, Owner],
    result: Tensor,
    name: str,
    count: int,
) -> Owner | None:
    """The owner of another window of the memory that a tensor lies in."""
    x = main(args, kwargs)
    lost = Lost(name, mixed=False, count=count)
    owner = by_id.get(id(x))
    start = result.storage_offset() - x.storage_offset()
    ends = [
        offset + sum((n - 1) * step for n, step in zip(y.shape, y.stride(), strict=True))
        for y, offset in ((x, 0), (result, start))
    ]
    if owner is None or isinstance(owner, Lost) or start < 0 or not x.numel():
        return lost
    memory = torch.full((max(ends) + 1,), MIXED, dtype=torch.int64, device=place_of([owner]))
    memory.as_strided(x.shape, x.stride()).copy_(ids_like(x, owner, memory.device))
    found = memory.as_strided(result.shape, result.stride(), start)
    # The owner of memory outside of the tensor is not known.
    return (
        lost
        if bool((found == MIXED).any())
        else recognise(found.clone(), tuple(result.shape), count, name)
    )


def _set(x: Tensor, index: Any, value: Any) -> Tensor:
    found = x.clone()
    found[index] = value if isinstance(value, Tensor) else 0.0
    return found


def _pad(x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    return F.pad(x, pad, mode)


def written_owner(
    base: Tensor, owner: Owner | None, view: Tensor, written: Owner | None
) -> Owner | None:
    """The owner of a base when a view of it has been written; without `written`, that of the view.

    Ids lie in memory as the base does, so that the view is the same window of them.
    """
    count = (owner or written or Regular(1, 1)).count
    if isinstance(owner, Lost) or isinstance(written, Lost):
        return next(o for o in (owner, written) if isinstance(o, Lost))
    device = place_of([owner, written])
    ids = torch.empty_strided(base.shape, base.stride(), dtype=torch.int64, device=device)
    ids.copy_(ids_like(base, owner, device))
    start = view.storage_offset() - base.storage_offset()
    window = ids.as_strided(view.shape, view.stride(), start)
    if written is None:
        return recognise(window.clone(), tuple(view.shape), count, "a view")
    window.copy_(ids_like(view, written, device))
    return recognise(ids.contiguous(), tuple(base.shape), count, "writing into a view")


__all__ = ["DIMENSIONS", "UNKNOWN", "owners_of", "written_owner"]
