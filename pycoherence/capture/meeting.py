"""Functions in which parameters meet examples: by their own rule, by copies, or refused."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.autocast import autocast_done, is_autocast_enabled
from pycoherence.capture.context import CallContext, decompositions, handlers
from pycoherence.capture.dimensions import given
from pycoherence.capture.errors import describe, function_name
from pycoherence.capture.facts import (
    EXAMPLES,
    PARAMETERS,
    SHARED,
    Facts,
    Ids,
    Lost,
    Owner,
    Regular,
    along,
    ids_of,
    recognise,
    regular_at,
    tensors,
)
from pycoherence.capture.fallback import example_by_example
from pycoherence.capture.owners import owners_of, written_owner
from pycoherence.capture.propagation import ids_like
from pycoherence.capture.rules import ADDING, ELEMENTWISE, JOINING, MOVEMENT, Rule, rule_of
from pycoherence.capture.spread import promote, replaced, spread

Seen = list[tuple[Tensor, Facts]]


def meet(
    c: CallContext,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rule: Rule,
    seen: Seen,
) -> Any:
    """Call a function in which tracked parameters meet examples."""
    handler = handlers.get(func)
    if handler is not None:
        if is_autocast_enabled():
            with autocast_done(func, (args, kwargs), c.cast) as (new_args, new_kwargs):
                result = handler(c, *new_args, **new_kwargs)
        else:
            result = handler(c, *args, **kwargs)
        if result is not NotImplemented:
            if func not in decompositions and not _is_known(c, result):
                c.note(func, args, kwargs, rule, seen, result, firm=True)
            return result
    # Integers only point at elements: the owner comes from the tensor that they point into.
    lost = next(((x, f.owner) for x, f in seen if isinstance(f.owner, Lost) and _flows(x)), None)
    if lost is None:
        if rule.name == "broadcast_tensors":
            return _broadcast_tensors(c, args)
        if rule.kind == ELEMENTWISE and rule.name != "index_fill":
            return _elementwise(c, func, args, kwargs, rule, seen)
        if rule.kind == MOVEMENT:
            result = _movement(c, func, args, kwargs, rule, seen)
            if result is not NotImplemented:
                return result
        if rule.dimensions is not None:
            result = _batched(c, func, args, kwargs, seen)
            if result is not NotImplemented:
                return result
    soft = all(f.soft for _, f in seen if f.kind == EXAMPLES)
    if handler is not None and soft and c.count is not None and c.inside is None:
        # They came from outside and may as well be the same for all, such as a fixed filter.
        for x, f in seen:
            if f.kind == EXAMPLES:
                c.mark_shared(x)
        return c.dispatch(func, args, kwargs, rule)
    return _unsupported(c, func, args, kwargs, seen, lost)


def _flows(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_known(c: CallContext, result: Any) -> bool:
    """Whether a handler has said itself whose elements its result holds."""
    return c.known(result) if type(result) is Tensor else all(map(c.known, tensors(result)))


def _first_owned(seen: Seen) -> tuple[Tensor, Owner]:
    firm = [(x, f.owner) for x, f in seen if f.kind == EXAMPLES and not f.soft]
    soft = [(x, f.owner) for x, f in seen if f.kind == EXAMPLES]
    return (firm or soft)[0]


def _elementwise(c: CallContext, func: Any, args: Any, kwargs: Any, rule: Rule, seen: Seen) -> Any:
    shape = tuple(torch.broadcast_shapes(*(x.shape for x, _ in seen)))
    if rule.writes and args and isinstance(args[0], Tensor):
        if c.facts(args[0]).kind == PARAMETERS:
            return _write_into_derived(c, func, args, kwargs, rule, seen)
        shape = tuple(args[0].shape)
    owned = [(x, f) for x, f in seen if f.kind == EXAMPLES]
    like = torch.empty(()).expand(shape)
    (owner,) = owners_of(func, args, kwargs, rule, owned, [like])
    if owner is None or isinstance(owner, Lost):
        return _unsupported(c, func, args, kwargs, seen, (owned[0][0], owner))
    new = {
        id(x): spread(c, x, _shape_of(x, shape), _owner_on(owner, shape, _shape_of(x, shape), x))
        for x, f in seen
        if f.kind == PARAMETERS
    }
    return c.dispatch(func, replaced(args, new), replaced(kwargs, new), rule)


def _shape_of(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _owner_on(owner: Owner, shape: Any, own: Any, x: Tensor) -> Owner:
    return owner


def _broadcast_tensors(c: CallContext, args: tuple[Any, ...]) -> Any:
    each = tensors(args)
    shape = torch.broadcast_shapes(*(x.shape for x in each))
    return tuple(c.dispatch(Tensor.expand, (x, shape), {}) for x in each)


# Movements.


def _movement(c: CallContext, func: Any, args: Any, kwargs: Any, rule: Rule, seen: Seen) -> Any:
    x, owner = _first_owned(seen)
    if rule.name in JOINING:
        return _join(c, func, args, kwargs, rule, seen)
    if rule.name in ("setitem", "index_put"):
        into, index = args[0], args[1]
        value = args[2] if len(args) > 2 else kwargs.get("values")
        if c.facts(into).kind == PARAMETERS:
            if rule.writes:
                return _write_into_derived(c, func, args, kwargs, rule, seen)
            return NotImplemented
        if c.facts(into).kind != EXAMPLES or not isinstance(value, Tensor):
            return NotImplemented
        if rule.name == "index_put":
            index = tuple(index)
        picked = into.detach()[index]
        ids = ids_like(into, c.facts(into).owner)[index]
        mine = recognise(ids, tuple(picked.shape), c.facts(into).owner.count, c.function_name)
        if mine is None:
            return NotImplemented
        new = {id(value): spread(c, value, tuple(picked.shape), mine)}
        return c.dispatch(func, replaced(args, new), replaced(kwargs, new), rule)
    del x, owner
    return NotImplemented


def _join(c: CallContext, func: Any, args: Any, kwargs: Any, rule: Rule, seen: Seen) -> Any:
    """Put parameters beside examples: each takes the owner that continues theirs."""
    x, owner = _first_owned(seen)
    each = args[0] if args else kwargs["tensors"]
    dim = given(args, kwargs, 1, "dim", kwargs.get("axis", 0))
    if rule.name == "hstack":
        dim = 0 if x.dim() == 1 else 1
    elif rule.name == "dstack":
        dim = 2
    elif rule.name in ("vstack", "column_stack"):
        dim = 0 if rule.name == "vstack" else 1
    place = along(tuple(x.shape), owner) if isinstance(owner, Regular) else None
    count = owner.count
    new: dict[int, Tensor] = {}
    for p in each:
        if c.facts(p).kind != PARAMETERS:
            continue
        if count == 1:
            mine: Owner = Regular(1, 1)
        elif place is not None and p.dim() == x.dim():
            d, inner = place
            if rule.name != "stack" and dim % x.dim() == d:
                return NotImplemented
            if p.shape[d] != x.shape[d]:
                return NotImplemented
            mine = regular_at(tuple(p.shape), d, inner, count)
        elif isinstance(owner, Ids) and p.dim() == x.dim():
            ids = owner.ids
            if rule.name != "stack" and ids.shape[dim] != 1:
                return NotImplemented
            if any(n not in (1, p.shape[d]) for d, n in enumerate(ids.shape)):
                return NotImplemented
            mine = owner
        else:
            return NotImplemented
        new[id(p)] = spread(c, p, tuple(p.shape), mine)
    return c.dispatch(func, replaced(args, new), replaced(kwargs, new), rule)


def _write_into_derived(
    c: CallContext, func: Any, args: Any, kwargs: Any, rule: Rule, seen: Seen
) -> Any:
    """Write examples into what is made of parameters, which then is of examples itself."""
    into = args[0]
    base = into._base
    if into.is_leaf or (base is not None and (base.is_leaf or not base.requires_grad)):
        return _unsupported(c, func, args, kwargs, seen, None)
    _, owner = _first_owned(seen)
    count = owner.count
    if rule.name == "setitem":
        value = args[2]
        empty = torch.full(into.shape, SHARED, dtype=torch.int64, device=into.device)
        ids = ids_like(value, c.facts(value).owner)
        empty[args[1]] = ids
        whole = recognise(empty, tuple(into.shape), count, c.function_name)
    else:
        owned = [(x, f) for x, f in seen if f.kind == EXAMPLES]
        (whole,) = owners_of(func, args, kwargs, rule, owned, [into])
    if base is not None and whole is not None:
        whole = written_owner(base, None, into, whole)
        into = base
    if whole is None or isinstance(whole, (Lost, Ids)):
        return _unsupported(c, func, args, kwargs, seen, (into, whole))
    # A copy, since the tensor will soon be made of something else.
    before = c.dispatch(Tensor.clone, (into,), {})
    copy = spread(c, before, tuple(into.shape), whole)
    # The tensor itself becomes the copy, without its own graph, which no gradient may take.
    into.detach_().copy_(copy)
    c.rewrite(into, whole)
    return c.dispatch(func, args, kwargs, rule)


# Functions that are told by their dimensions.


def _batched(c: CallContext, func: Any, args: Any, kwargs: Any, seen: Seen) -> Any:
    """Give parameters the dimension of the examples, where a function broadcasts over it."""
    rule = rule_of(func)
    if (
        rule.name
        not in """
    matmul mm bmm scaled_dot_product_attention cosine_similarity pairwise_distance cdist baddbmm
    vecdot linalg_vecdot cross linalg_cross grid_sample  mse_loss l1_loss
    smooth_l1_loss huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits
    """.split()
    ):
        return NotImplemented
    x, owner = _first_owned(seen)
    if owner.count != 1 and (
        not isinstance(owner, Regular) or (place := along(tuple(x.shape), owner)) is None
    ):
        return NotImplemented
    if owner.count == 1:
        new = {
            id(p): spread(c, p, tuple(p.shape), Regular(1, 1))
            for p, f in seen
            if f.kind == PARAMETERS
        }
        return c.dispatch(func, replaced(args, new), replaced(kwargs, new))
    d, inner = place  # pyright: ignore[reportPossiblyUnboundVariable]
    behind = x.dim() - d  # the dimension, counted from the last one
    matrices = ("matmul", "mm", "bmm", "scaled_dot_product_attention", "baddbmm", "cdist")
    if rule.name in matrices and behind <= 2:
        return NotImplemented
    new: dict[int, Tensor] = {}
    for p, f in seen:
        if f.kind != PARAMETERS:
            continue
        if p.dim() >= behind and p.shape[p.dim() - behind] != 1:
            if p.shape[p.dim() - behind] != x.shape[d]:
                return NotImplemented
            mine = regular_at(tuple(p.shape), p.dim() - behind, inner, owner.count)
            new[id(p)] = promote(c, p, mine)
            continue
        size = [1] * max(0, behind - p.dim()) + list(p.shape)
        size[len(size) - behind] = x.shape[d]
        mine = regular_at(tuple(size), len(size) - behind, inner, owner.count)
        new[id(p)] = spread(c, p, tuple(size), mine)
    result = c.dispatch(func, replaced(args, new), replaced(kwargs, new))
    for y in () if "loss" in rule.name or "cross_entropy" in rule.name else tensors(result):
        mixed = c.facts(y).owner
        if isinstance(mixed, Lost):
            c.refuse_lost(mixed, y)
    return result


# Calls that nothing above takes.


def _unsupported(
    c: CallContext,
    func: Any,
    args: Any,
    kwargs: Any,
    seen: Seen,
    lost: tuple[Tensor, Any] | None,
) -> Any:
    """Treat a parameter used in an unknown way as `on_unsupported` says."""
    way = c.request.on_unsupported
    if way == "skip":
        _expect_unmeasured(c)
        c.skip(c.used)
        return c.dispatch(func, args, kwargs)
    rule = rule_of(func)
    if not rule.writes:
        plain = func(*args, **kwargs)  # torch may have something to say of the arguments
        if not any(x.requires_grad for x in tensors(plain)):
            c.note(func, args, kwargs, rule, seen, plain)
            return plain
    if lost is not None and isinstance(lost[1], Lost):
        c.refuse_lost(lost[1], lost[0])
    if way != "raise" and not rule.writes and rule.kind not in (MOVEMENT, ADDING):
        result = example_by_example(c, func, args, kwargs, seen, always=way == "vmap")
        if result is not NotImplemented:
            return result
    if c.inside is not None:
        c.refuse(
            f"several examples of the batch lie within what it takes for one row of its input "
            f"{tuple(c.inside.shape)}",
            "move the batch to the first dimension before it",
        )
    names = (function_name(known) for known in handlers)
    known = ", ".join(sorted(name for name in names if name.startswith("F.")))
    c.refuse(
        "per-example gradients through this function are not known",
        f"write the layer with one that is ({known}, or products and sums of tensors); ask for "
        "on_unsupported='vmap', which makes them example by example whatever it takes, or 'skip', "
        "which leaves the parameter out; teach the function to the capture with pc.register_site; "
        "leave an L2 penalty to the optimizer's weight_decay, and take others outside the block; "
        "take print-outs of parameter.detach(); or freeze the parameter with requires_grad_(False)",
    )


def _expect_unmeasured(c: CallContext) -> None:
    """Refuse to skip a parameter that has been measured in another function."""
    measured = [name for name in c.used if name in c.results.measured]
    if measured:
        c.refuse(
            f"per-example gradients through this function are not known, and "
            f"{describe(measured[0])} has been measured in another one, so that it cannot be "
            "skipped",
            "ask for on_unsupported='vmap', or freeze it with requires_grad_(False)",
        )


__all__ = ["Sequence", "ids_of", "meet"]
