"""The mode that sees every torch function of a forward pass.

Reading order: `see` -> `dispatch` -> one of `_propagate` (no parameter takes part),
`_derive` (no example does) and `meeting.meet` (both do).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import UninitializedParameter

from pycoherence.capture.across import Across
from pycoherence.capture.answers import key_of, recall, remember
from pycoherence.capture.autocast import expect_no_autocast, is_autocast_enabled
from pycoherence.capture.backward import BACKWARD, BackwardPasses
from pycoherence.capture.blocks import Block, Mode
from pycoherence.capture.context import decompositions, guards, handlers
from pycoherence.capture.derived import Derived, Recipe
from pycoherence.capture.dimensions import given
from pycoherence.capture.errors import describe, function_name, unsupported
from pycoherence.capture.facts import (
    CONSTANT,
    EXAMPLES,
    FOREIGN,
    IS_CONSTANT,
    IS_FOREIGN,
    IS_MADE,
    PARAMETERS,
    SHARED,
    Facts,
    FactTable,
    Ids,
    Lost,
    Owner,
    Regular,
    along,
    regular_at,
    tensors,
    version_of,
)
from pycoherence.capture.groups import Groups, Misfit
from pycoherence.capture.layer import LayerRule, apply_layer
from pycoherence.capture.meeting import meet
from pycoherence.capture.model import expect_no_pipeline, modules_of
from pycoherence.capture.outside import NESTED, SPARSE, VMAP, Outside, kind_of
from pycoherence.capture.owners import owners_of, written_owner
from pycoherence.capture.propagation import JOINED, dims_of_owner, joined
from pycoherence.capture.request import Request
from pycoherence.capture.results import ParameterInfo, Results
from pycoherence.capture.rows import First, rows_of
from pycoherence.capture.rules import (
    ATTRIBUTE,
    ELEMENTWISE,
    FACTORY,
    JOINING,
    UNKNOWN,
    VIEW,
    Rule,
    known_rules,
    rule_of,
)
from pycoherence.capture.sharded import carried, layouts_of
from pycoherence.capture.spread import replaced
from pycoherence.capture.torch_internals import (
    CustomNode,
    active,
    are_saved_otherwise,
    has_captured,
    is_distributed,
    is_distributing,
    is_hooked,
    is_in_custom_function,
    is_post_backward,
    kept_by,
    leaves_below,
    saved_as_they_are,
)
from pycoherence.capture.unsharded import Unsharded, refuse_sharded
from pycoherence.capture.uses import LayerCall, ParameterArgument, ParameterUse
from pycoherence.capture.wrappers import expect_no_sync, expect_not_joined, note_averaged
from pycoherence.errors import UnsupportedError
from pycoherence.sites import Layout

_RANDOM = frozenset(
    """
    rand randn randint normal tensor as_tensor new_tensor bernoulli
    """.split()
)
_DATA = frozenset(["tensor", "as_tensor", "new_tensor"])
_DRAWS = frozenset(
    """
    native_dropout dropout alpha_dropout feature_dropout feature_alpha_dropout
    dropout1d dropout2d dropout3d bernoulli
    rand_like randn_like randint_like multinomial rrelu gumbel_softmax normal
    fractional_max_pool2d fractional_max_pool3d
    """.split()
)
_SHAPE_ONLY = frozenset(["expand_as", "view_as", "reshape_as", "type_as", "to"])
_LIKE = frozenset(["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new"])


class Capture:
    """Routes each function in which parameters meet examples through `CapturedLayer`.

    Args:
        model: Whose pass it is.
        parameters: Its `tracked_parameters`.
        request: The quantities to measure.
        around: Gives what a backward pass that makes gradients of parameters runs inside.

    Attributes:
        parameters: The tracked parameters, by name.
        request: The quantities to measure.
        results: The results of the backward passes.
        across: The part of the block that several processes take together.
        passes: Runs and guards the backward passes.
        count: How many rows the batch has; `None` until it is known.
        function: The torch function that is being called, for messages.
        inside: Its input, if several examples lie within what it takes for one row.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        request: Request,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.parameters = parameters
        self.request = request
        self._unsharded: Unsharded | None = None
        self._distributes = False
        plain = all(type(p) is nn.Parameter for p in parameters.values())
        if not plain:
            self._unsharded = Unsharded.of(module for _, module in modules_of(model))
        about = info_of if plain else self._info_of
        self.results = Results({name: about(p) for name, p in parameters.items()})
        if not plain:
            self._distributes = any(info.layout for info in self.results.parameters.values())
        ranks = request.ranks
        if ranks is not None:
            expect_not_joined(model)
        self.across = None if ranks is None else Across(ranks, request, self.results)
        measured = request, self.results, around, self.across
        self.passes = BackwardPasses(model, parameters, *measured)
        self.count: int | None = None
        self.groups = Groups(0, 0, 1)  # of the rows that are counted
        self.function: Callable[..., Any] | None = None
        self._seen: list[tuple[Tensor, Facts]] = []
        self.inside: Tensor | None = None
        self._source = ""
        self._names = {id(p): name for name, p in parameters.items()}
        self._facts = FactTable()
        self._outside = Outside(model)
        self._rewritten: set[int] = set()
        self._bases: dict[int, Facts] = {}  # of what is being written, as they were before
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}
        self._calls = count()
        self._leaves: dict[int, ParameterArgument] = {}
        is_parameter = Facts(PARAMETERS)
        for p in parameters.values():
            self._facts.put(p, is_parameter)
        self._learn()

    @property
    def whole(self) -> Results:
        """The results of the examples of all processes that take part."""
        return self.results if self.across is None else self.across.whole

    def __enter__(self) -> "Capture":
        self._mode = Mode(self)
        self._block = Block(self, self._mode)
        self._block.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._block.close()

    def rest(self) -> None:
        """See no more functions."""
        self._block.rest()

    def forget(self) -> None:
        """Let go of the tensors of the forward pass; constants stay constants in later blocks."""
        self._outside.remember(self._facts.constants())
        self._facts.clear()
        self._casts.clear()
        self._rewritten.clear()
        self._bases.clear()

    # The walk of one function.

    def see(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function of the block."""
        if self._distributes and is_distributing():
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverloadPacket) and len(func.overloads()) == 1:
            func = getattr(func, func.overloads()[0])  # by which it is taught
        rule = known_rules.get(func)
        if rule is None:
            rule = known_rules[func] = rule_of(func)
        if rule.kind == ATTRIBUTE:
            if func not in BACKWARD:
                return func(*args, **kwargs)
            return self._run(func, args, kwargs)
        if func is torch.autograd.grad or func is torch.autograd.backward:
            return self._run(func, args, kwargs)
        return self.dispatch(func, args, kwargs, rule)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expect_no_pipeline()
        self._learn()  # those that no function has used
        self._expect_not_sharded(self.parameters)
        found = self.passes.run(self._mode, func, args, kwargs, self.names_of)
        if self._unsharded is not None and not self.passes.running:
            self._unsharded.expect_reduced(self.parameters)
        return found

    def measure(self, loss: Tensor, leaves: Sequence[Tensor]) -> None:
        """Run a backward pass that leaves the gradients of the model alone."""
        if self.across is not None:
            self.across.meet()
        arguments = (loss, leaves), {"allow_unused": True}
        self.passes.guarded(self._mode, torch.autograd.grad, *arguments, keep=True)

    def dispatch(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule | None = None,
    ) -> Any:
        """Call a function as the model does, and remember what its results are."""
        if rule is None:
            rule = known_rules.get(func) or rule_of(func)
        kinds = 0
        seen: list[tuple[Tensor, Facts]] = []
        facts_of = self.facts
        if rule.writes and args and isinstance(args[0], Tensor) and args[0]._base is not None:
            # Before it is written: a constant that is a part of the graph then is one no longer.
            self._bases[id(args[0]._base)] = facts_of(args[0]._base)
        values = args if rule.name not in _SHAPE_ONLY else args[:1]
        for value in (*values, *kwargs.values()) if kwargs else values:
            kind = type(value)
            if kind is Tensor or isinstance(value, Tensor):
                facts = facts_of(value)
                kinds |= facts.kind
                seen.append((value, facts))
            elif kind is not int and isinstance(value, (list, tuple, dict)):
                kinds |= self._look_into(value, seen)
        if func in guards and kinds & EXAMPLES:
            self._begin(func, seen)
            guards[func](self, *args, **kwargs)
        if kinds & PARAMETERS and torch.is_grad_enabled() and rule.name not in _LIKE:
            if self.count is None and kinds & EXAMPLES and self._look_for_batch(seen):
                return self.dispatch(func, args, kwargs, rule)
            if self.count is None and kinds & EXAMPLES and self._is_single(seen):
                self.passes.is_single = True
            elif kinds & EXAMPLES:
                self._begin(func, seen)
                before = self.count, self.results.batch_size, self.passes.is_single
                try:
                    return meet(self, func, args, kwargs, rule, seen)
                except BaseException:
                    # A call that fails has not happened.
                    self.count, self.results.batch_size, self.passes.is_single = before
                    raise
            if func in decompositions and rule.kind == UNKNOWN:
                self._begin(func, seen)
                found = handlers[func](self, *args, **kwargs)
                if found is not NotImplemented:
                    return found
            return self._derive(func, args, kwargs, rule, seen)
        if kinds & EXAMPLES and rule.name not in _LIKE and rule.kind != FACTORY:
            if func in decompositions and rule.kind == UNKNOWN:
                self._begin(func, seen)
                try:
                    found = handlers[func](self, *args, **kwargs)
                except UnsupportedError:
                    found = NotImplemented  # no parameter takes part that would be missed
                if found is not NotImplemented:
                    return found
            return self._propagate(func, args, kwargs, rule, seen)
        result = func(*args, **kwargs)
        if isinstance(result, (Tensor, list, tuple)):
            self._note_new(rule, result, soft=not kinds and rule.name in _RANDOM)
            if self.count == 1 and kinds & FOREIGN and not rule.writes:
                self._note_foreign(result)
        return result

    def _note_foreign(self, result: Any) -> None:
        """Keep in mind that rows may be those of a batch, of which the one row is no example."""
        for x in tensors(result):
            if x.dim() and x.is_floating_point():
                self._facts.put(x, IS_FOREIGN)

    def _look_into(self, value: Any, seen: list[tuple[Tensor, Facts]]) -> int:
        kinds = 0
        for x in tensors(value):
            facts = self.facts(x)
            kinds |= facts.kind
            seen.append((x, facts))
        return kinds

    def _begin(self, func: Callable[..., Any], seen: list[tuple[Tensor, Facts]]) -> None:
        self.function, self.inside, self._seen = func, None, seen

    @property
    def used(self) -> list[str]:
        """The tracked parameters that the function being called meets."""
        names = [n for x, f in self._seen if f.kind == PARAMETERS for n in self.names_of(x)]
        return list(dict.fromkeys(names))

    def _note_new(self, rule: Rule, result: Any, *, soft: bool) -> None:
        if self.count is None and rule.name in ("ones", "full") and not self.passes.is_single:
            soft = any(x.dim() > 1 for x in tensors(result))
        for x in tensors(result):
            known = self._facts.get(x)
            if known is None or (known.kind != PARAMETERS and not rule.writes):
                # Integers that are written down in the block are places, not words.
                if x.layout != torch.strided:
                    lost = Lost(kind_of(x), mixed=False, count=self.count or 1)
                    self._facts.put(x, Facts(EXAMPLES, lost))
                elif soft and x.dim() and (x.is_floating_point() or rule.name not in _DATA):
                    self._facts.put(x, self._outside.by_first_dimension(x, 2))
                else:
                    self._facts.put(x, IS_MADE)

    # Facts of tensors.

    def facts(self, x: Tensor) -> Facts:
        """The facts of a tensor."""
        entry = self._facts.entries.get(id(x))  # as `FactTable.get`, which takes a call
        found = entry[1] if entry is not None and entry[0]() is x else None
        if found is None or (
            found.kind == CONSTANT
            and (x.grad_fn is not None or (self._unsharded is not None and x.requires_grad))
        ):
            # Nothing that was seen has made it, or made it a part of the graph; a leaf of FSDP2 may
            # have been made in sight.
            if is_hooked(x):
                found = self._behind_hook(x)
            elif found is IS_MADE and self._is_of_parameters(x):
                found = Facts(PARAMETERS, derived=Derived(x, None))
            else:
                found = self._unseen(x)
            self._facts.put(x, found)
        elif not found.soft and not self._rewritten:
            return found
        elif (
            self._rewritten
            and x._base is not None
            and id(x._base) in self._rewritten
            and self._facts.is_stale(x)
        ):
            found = self._of_base(x)
        if found.soft and self.count is not None:
            if found.soft == 2:
                return IS_CONSTANT
            if found.owner.count != self.count:
                return IS_CONSTANT if found.owner.count <= 1 else IS_FOREIGN
            square = x.dim() > 1 and x.shape[0] == x.shape[1]
            if square and not x.is_floating_point() and not x.is_complex():
                # Ids [B, T] or places [T, T]: what they meet will tell.
                return IS_CONSTANT
        return found

    def _is_of_parameters(self, x: Tensor) -> bool:
        """Whether a custom Function made a tensor of parameters alone, such as rounded weights.

        Its forward pass was seen, and no example took part in it. Its backward pass is its own, and
        may take part in nothing but what it was left.
        """
        node = x.grad_fn
        if not isinstance(node, CustomNode) or has_captured(x):
            return False
        try:
            kept = tensors(kept_by(node))
        except RuntimeError:
            return False
        if any(self.facts(y).kind & (EXAMPLES | FOREIGN) for y in kept):
            return False
        return all(id(leaf) in self._names for leaf in leaves_below(x))

    def _from_outside(self, x: Tensor) -> Facts:
        return self._outside.facts(x, self.count, self._facts.batch_first)

    def _unseen(self, x: Tensor) -> Facts:
        """The facts of a tensor that no function of the block has made, as far as is seen."""
        if self._unsharded is not None and isinstance(x, nn.Parameter):
            self._learn()
            found = self._facts.get(x)
            if found is not None:
                return found
        if type(x) is not Tensor or is_distributed(x):
            return carried(x, self._facts) or self._from_outside(x)
        return self._behind_hook(x) if is_hooked(x) else self._from_outside(x)

    def _info_of(self, p: Tensor) -> ParameterInfo:
        info = info_of(p)
        # What FSDP2 shards is whole while its layers run, and so are its gradients.
        whole = self._unsharded is not None and self._unsharded.manages(p)
        return info._replace(layout=None) if whole else info

    def _learn(self) -> None:
        """Take the leaves that FSDP2 has made since for the parameters they stand for."""
        found = () if self._unsharded is None else self._unsharded.appeared()
        names = [(self._names.get(id(sharded)), leaf) for sharded, leaf in found]
        leaves = {name: leaf for name, leaf in names if name is not None}
        for name, leaf in leaves.items():
            self._names[id(leaf)] = name
            self._facts.put(leaf, Facts(PARAMETERS))
            layout = Layout.of(leaf)
            if layout is not None:  # by tensor parallelism, below FSDP2
                info = self.results.parameters[name]
                self.results.parameters[name] = info._replace(layout=layout)
                self._distributes = True
        if leaves and self._unsharded is not None:
            self._unsharded.names.update(leaves)
            self.passes.learn(leaves)

    def _behind_hook(self, x: Tensor) -> Facts:
        """The facts of a module's output that its backward hooks have wrapped, unseen."""
        for y, facts in self._facts.alive():
            same = y is not x and y.shape == x.shape and y.dtype == x.dtype
            if same and y.stride() == x.stride() and y.data_ptr() == x.data_ptr():
                if facts.kind != PARAMETERS:
                    return facts
                if is_post_backward(x.grad_fn):
                    # Past its node, which frees the module's parameters when a gradient comes.
                    return Facts(PARAMETERS, derived=facts.derived or Derived(y, None))
                recipe = Recipe(Tensor.contiguous, (y,), {}, version_of(y), 0, version_of(x))
                return Facts(PARAMETERS, derived=Derived(x, recipe))
        return self._from_outside(x)

    def put(self, x: Tensor, facts: Facts) -> None:
        """Say what a tensor is."""
        self._facts.put(x, facts)

    def mark(self, x: Tensor, owner: Owner) -> None:
        """Say whose elements a tensor holds."""
        self._facts.put(x, Facts(EXAMPLES, owner))

    def rewrite(self, x: Tensor, owner: Owner) -> None:
        """Say whose elements a tensor with views holds after it was written."""
        self._facts.put(x, Facts(EXAMPLES, owner))
        self._rewritten.add(id(x))

    def mark_shared(self, x: Tensor) -> None:
        """Say that no example has a part in a tensor."""
        self._facts.put(x, IS_CONSTANT)

    def names_of(self, x: Any) -> tuple[str, ...]:
        """The tracked parameters that a tensor is, or is made of, with no example in it."""
        name = self._names.get(id(x))
        if name is not None:
            return (name,)
        facts = self._facts.get(x) if isinstance(x, Tensor) else None
        if facts is None or facts.kind != PARAMETERS or facts.derived is None:
            return ()
        return tuple(name for name, _ in self._uses(facts.derived.source))

    def _uses(self, source: Tensor) -> list[ParameterUse]:
        name = self._names.get(id(source))
        if name is not None:
            return [(name, source)]
        leaves = [x for x in leaves_below(source) if id(x) in self._names]
        order = {name: i for i, name in enumerate(self.parameters)}
        uses = [(self._names[id(x)], x) for x in leaves]
        return sorted(uses, key=lambda use: order[use[0]])

    def skip(self, names: Sequence[str]) -> None:
        """Measure parameters no longer: they count as constants."""
        for name in names:
            self.results.skipped.append(name)
            for p in {id(p): p for p in (self.parameters[name], self.passes.leaves[name])}.values():
                self._facts.put(p, IS_CONSTANT)
                self._names.pop(id(p), None)
                self._leaves.pop(id(p), None)
            self.passes.skip(name)

    def _look_for_batch(self, seen: list[tuple[Tensor, Facts]]) -> bool:
        """Whether the first tensor that the model was called with tells of another batch."""
        if not all(f.soft for _, f in seen if f.kind == EXAMPLES):
            return False
        for x in self._outside.arguments() or ():
            facts = self.facts(x)
            if facts.kind == EXAMPLES and not isinstance(facts.owner, Lost):
                counts = {f.owner.count for _, f in seen if f.kind == EXAMPLES}
                if facts.owner.count == 1 or counts != {facts.owner.count}:
                    self.settle(facts.owner, x)
                    self._facts.put(x, Facts(EXAMPLES, facts.owner, soft=1))
                    return True
                return False
        return False

    def _is_single(self, seen: list[tuple[Tensor, Facts]]) -> bool:
        """Whether what may be of examples is one row, while the size of the batch is not known.

        It is then the same for all, such as one time step of a diffusion model; or the batch is of
        one example, whose gradients are those of the batch.
        """
        if self.across is not None:
            return False  # other processes may have more examples, and exchange factors
        return all(f.soft and f.owner.count == 1 for _, f in seen if f.kind == EXAMPLES)

    def _of_base(self, x: Tensor) -> Facts:
        """The facts of a view whose base has been written into."""
        base = x._base
        assert base is not None
        facts = self._facts.get(base)
        if facts is None or facts.kind == CONSTANT:
            return IS_CONSTANT
        if facts.kind == EXAMPLES and x.dtype != base.dtype:
            lost = Lost("a view of another dtype", mixed=False, count=facts.owner.count)
            return Facts(EXAMPLES, lost)
        if facts.kind == PARAMETERS:
            found = Facts(PARAMETERS, derived=Derived(x, None))
        else:
            owner = written_owner(base, facts.owner, x, None)
            found = IS_CONSTANT if owner is None else Facts(EXAMPLES, owner, soft=facts.soft)
        return found

    def known(self, x: Tensor) -> bool:
        """Whether it has been said what a tensor is."""
        return self._facts.get(x) is not None

    def is_example(self, x: Tensor) -> bool:
        """Whether examples have a part in a tensor."""
        return self.facts(x).kind == EXAMPLES

    def declare(self, x: Tensor, dim: int) -> None:
        """Take what a function says of a tensor from outside: which dimension is the batch.

        Raises:
            UnsupportedError: A function before it took another dimension.
        """
        facts = self._facts.get(x) or self._from_outside(x)
        if facts.kind != EXAMPLES:
            return
        owner = regular_at(tuple(x.shape), dim, 1, x.shape[dim])
        mine = facts.owner
        if facts.soft and isinstance(mine, Ids):
            owner = mine
        elif facts.soft and isinstance(mine, Regular):
            place = along(tuple(x.shape), mine)
            if place is not None and place[0] == dim:
                owner = mine  # perhaps with several rows for an example
        if facts.soft and (self.count is None or self.count == owner.count):
            self._facts.put(x, Facts(EXAMPLES, owner))
        elif facts.soft and isinstance(facts.owner, Regular) and facts.owner.count == self.count:
            self._facts.put(x, Facts(EXAMPLES, facts.owner))
        elif not facts.soft and not _only_along(facts.owner, dim, tuple(x.shape)):
            words = ("first", "second")
            self.refuse(
                f"it takes the {words[dim]} dimension of its input {tuple(x.shape)} for the batch, "
                "but a function before it took another one"
                if not isinstance(facts.owner, Lost)
                else f"it takes the {words[dim]} dimension of its input {tuple(x.shape)} for the "
                f"batch, but where that is after {facts.owner.function} is not known",
                "keep the batch first in all layers (batch_first=True); say where it is in the "
                "input with pc.mark_examples(x, dim=1); or give the layers before it inputs "
                "[B, T, ...], and transpose(0, 1) what they return",
            )

    def share_soft(self, x: Tensor) -> None:
        """Take what a function says of a tensor from outside: no dimension is the batch."""
        facts = self._facts.get(x)
        if facts is not None and facts.kind == EXAMPLES and facts.soft:
            self._facts.put(x, IS_CONSTANT)

    def by_rows(self, x: Tensor) -> None:
        """Take the first dimension of a tensor for the batch."""
        owner = regular_at(tuple(x.shape), 0, 1, x.shape[0])
        self._facts.put(x, Facts(EXAMPLES, owner))

    def mark_like(self, found: Any, x: Tensor, features: int) -> None:
        """Say that a result has the rows of an input."""
        facts, n = self.facts(x), x.dim() - features
        for y in tensors(found):
            places = [d if d < n else JOINED for d in range(x.dim())]
            owner = joined([(x, facts.owner, places)], y, self.function_name)
            self._facts.put(y, IS_CONSTANT if owner is None else Facts(EXAMPLES, owner))

    def aligned(self, x: Tensor, dim: int, other: Tensor, place: int) -> Tensor:
        """A tensor whose dimension is the batch, as a function says, beside another tensor."""
        facts, others = self.facts(x), self.facts(other)
        if others.kind != EXAMPLES or (facts.kind == EXAMPLES and not facts.soft):
            return x
        if x.shape[dim] != other.shape[place] or facts.kind == PARAMETERS:
            return x
        owner: Owner = others.owner
        shape = tuple(other.shape)
        if isinstance(owner, Regular):
            at = along(shape, owner)
            if at is None or at[0] != place:
                return x
            owner = regular_at(tuple(x.shape), dim, at[1], owner.count)
        elif isinstance(owner, Lost):
            return x
        else:
            size = [1] * x.dim()
            size[dim] = owner.ids.shape[place]
            if owner.ids.numel() != size[dim]:
                return x
            owner = Ids(owner.ids.reshape(size), owner.count)
        alias = x.view_as(x)
        self._facts.put(alias, Facts(EXAMPLES, owner, soft=others.soft))
        return alias

    def owner_by_index(self, p: Tensor, pick: Callable[[Tensor], Tensor], index: Any) -> Any:
        """Whose the elements are that indices pick from what all examples share."""
        constant = p.detach()
        self._facts.put(constant, IS_CONSTANT)
        with self.tracked(), torch.no_grad():
            found = pick(constant)
        facts = self._facts.get(found)
        return facts.owner if facts is not None and facts.kind == EXAMPLES else None

    # No parameter takes part.

    def _propagate(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule,
        seen: list[tuple[Tensor, Facts]],
    ) -> Any:
        before = args
        first = args[0] if args else None
        shaped = isinstance(first, Tensor) and first.dim() > 1
        if rule.writes and rule.kind not in (ELEMENTWISE, VIEW) and shaped:
            # The rule needs the shape from before the call, which may change it in place.
            old = args[0].detach()
            self._facts.put(old, self.facts(args[0]))
            before = (old, *args[1:])
            seen = [(old if x is args[0] else x, f) for x, f in seen]
        result = func(*args, **kwargs)
        if self.count == 1:
            self._expect_one_row(func, seen, result)
        self.note(func, before, kwargs, rule, seen, result if not rule.writes else args[0])
        return result

    def _expect_one_row(
        self, func: Callable[..., Any], seen: list[tuple[Tensor, Facts]], result: Any
    ) -> None:
        """Refuse to take rows from outside for those of a batch of one.

        The one row may be the same for all examples, such as a time step, and they the batch.
        """
        rows = {y.shape[0] for y in tensors(result) if y.dim()}
        for x, facts in seen:
            if facts.kind == FOREIGN and x.is_floating_point() and x.shape[0] in rows:
                self._begin(func, seen)
                self.refuse_rows(x)

    def note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule,
        seen: list[tuple[Tensor, Facts]],
        result: Any,
        *,
        firm: bool = False,
    ) -> None:
        """Remember whose elements the results of a function hold.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its arguments by name.
            rule: Its rule.
            seen: The tensors among its arguments.
            result: Its result.
            firm: Whether the owner is certain, since the function was captured.
        """
        owned = [(x, f) for x, f in seen if f.kind == EXAMPLES]
        # The usual case first: all of one shape and one owner, and so is the result.
        x, facts = owned[0]
        if (
            not firm
            and rule.kind in (ELEMENTWISE, VIEW)
            and type(result) is Tensor
            and (result.shape == x.shape or (rule.kind == VIEW and result.numel() == x.numel()))
        ):
            for y, other in owned[1:]:
                if y.shape != x.shape or other.owner != facts.owner:
                    break
                if other.soft < facts.soft:
                    facts = other  # the more certain
            else:
                if type(facts.owner) is not Ids or result.shape == x.shape:
                    if rule.writes and self._facts.get(result) is not facts:
                        self._put_result(result, facts, rule)
                    else:
                        self._facts.put(result, facts)
                    return
        results = [result] if type(result) is Tensor else tensors(result)
        key = None
        if rule.lasts and not firm:
            known = {id(y): other for y, other in owned}
            key = key_of(func, args, kwargs, results, known, rule.kind)
            answer = None if key is None else recall(key)
            if answer is not None:
                for y, found in zip(results, answer, strict=True):
                    if type(found.owner) is Lost:
                        found = self._facts_of_result(y, found.owner, rule, owned, found.soft)
                    if rule.writes:
                        self._put_result(y, found, rule)
                    else:
                        self._facts.put(y, found)
                return
        owners = owners_of(func, args, kwargs, rule, owned, results)
        soft = 0 if firm or not all(f.soft for _, f in owned) else min(f.soft for _, f in owned)
        told: list[Facts] = []
        for y, owner in zip(results, owners, strict=True):
            found = self._facts_of_result(y, owner, rule, owned, soft, firm=firm)
            self._put_result(y, found, rule)
            # Whether something lost matters depends on more than the key.
            told.append(Facts(EXAMPLES, owner, soft=soft) if type(owner) is Lost else found)
        if key is not None and _lasts(owners, results, rule):
            remember(key, tuple(told))

    def _facts_of_result(
        self,
        y: Tensor,
        owner: Owner | None,
        rule: Rule,
        owned: list[tuple[Tensor, Facts]],
        soft: int,
        *,
        firm: bool = False,
    ) -> Facts:
        if owner is None and firm:
            # Rows of padding alone, at which no gradient may arrive.
            ids = torch.full([1] * y.dim(), SHARED, device=y.device)
            return Facts(EXAMPLES, Ids(ids, owned[0][1].owner.count))
        if y.layout != torch.strided:
            lost = Lost(kind_of(y), mixed=False, count=owned[0][1].owner.count)
            return Facts(EXAMPLES, lost)
        if owner is None or (
            type(owner) is Lost
            and not y.requires_grad
            and not (y.is_floating_point() and soft and self.count is None)
            and not is_in_custom_function()
        ):
            # No gradient flows through it: it is the same for all who look at it.
            if owner is None and rule.writes and y.requires_grad and not y._is_view():
                y.detach_()  # nothing of an example went in, as of a mask that picked no row
            return IS_CONSTANT
        if soft and self.count is None and rule.name not in JOINING:
            owner = self._outside.rerooted(y, owner)
        return Facts(EXAMPLES, owner, soft=soft)

    def _put_result(self, x: Tensor, facts: Facts, rule: Rule) -> None:
        if rule.writes and x._base is not None:
            self._write_base(x, facts)
        self._facts.put(x, facts)
        if rule.writes:
            self._rewritten.add(id(x))

    def _write_base(self, x: Tensor, facts: Facts) -> None:
        """Remember what was written into a view in its base, which other views look at."""
        base = x._base
        assert base is not None
        known = self._bases.pop(id(base), None) or self.facts(base)
        if facts.kind == PARAMETERS:
            self._facts.put(base, Facts(PARAMETERS, derived=Derived(base, None)))
        elif facts.kind == EXAMPLES and known.kind != PARAMETERS:
            owner = known.owner if known.kind == EXAMPLES else None
            found = written_owner(base, owner, x, facts.owner)
            self._facts.put(base, IS_CONSTANT if found is None else Facts(EXAMPLES, found))
        self._rewritten.add(id(base))

    # No example takes part.

    def _derive(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rule: Rule,
        seen: list[tuple[Tensor, Facts]],
    ) -> Any:
        if self._unsharded is not None:
            args, kwargs, seen = _unwrapped(args, kwargs, seen)
        foreign = [x for x, f in seen if f.kind == FOREIGN and x.is_floating_point()]
        if foreign:
            self._begin(func, seen)
            self.refuse_rows(foreign[0])
        recipe_of: tuple[Any, ...] | None = None
        with saved_as_they_are():
            if rule.name in ("dropout", "dropout1d", "dropout2d", "dropout3d") and not rule.writes:
                func, args, kwargs = self._with_mask(func, args, kwargs)
            result = func(*args, **kwargs)
        if not rule.writes and not _draws(rule, args, kwargs) and rule.kind != UNKNOWN:
            recipe_of = func, _frozen(args), _frozen(kwargs), _versions(args, kwargs)
        same = () if rule.writes else {id(x) for x, _ in seen}
        for i, x in enumerate(tensors(args[0] if rule.writes and args else result)):
            if id(x) in same:
                continue  # such as what is contiguous already
            if not x.requires_grad:
                self._facts.put(x, IS_CONSTANT)
            elif x.layout != torch.strided:
                self._begin(func, seen)
                self.refuse(
                    f"what it makes of the parameter is sparse ({x.layout})",
                    "make a dense tensor of it, or freeze the parameter with requires_grad_(False)",
                )
            elif id(x) not in self._names:
                recipe = None
                if recipe_of is not None:
                    recipe = Recipe._make((*recipe_of, i, version_of(x)))
                self._put_result(x, Facts(PARAMETERS, derived=Derived(x, recipe)), rule)
        return result

    def _with_mask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Dropout as a product with the mask it draws, so that it can be made again."""
        x = args[0] if args else kwargs["input"]
        given = {k: v for k, v in kwargs.items() if k != "input"}
        if given.pop("inplace", False) or len(args) > 3:
            return func, args, kwargs
        mask = func(torch.ones_like(x), *args[1:], **given)
        self._facts.put(mask, IS_CONSTANT)
        return torch.mul, (x, mask), {}

    # For functions and rules.

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """See torch functions that the code of a rule calls, as if the model did."""
        before = self.function, self._seen
        with active(self._mode):
            yield
        self.function, self._seen = before

    def settle(self, owner: Owner, x: Tensor) -> None:
        """Learn how many examples there are, or compare.

        Raises:
            UnsupportedError: There are others, no whole groups, or it is not known whose they are.
        """
        if isinstance(owner, Lost):
            self.refuse_lost(owner, x)
        if self.count is None:
            try:
                self.groups = self.request.grouping.groups(owner.count)
            except Misfit as error:
                rows = f"its input {tuple(x.shape)} has {owner.count} rows"
                self.refuse(f"{rows}, {error.why}", error.fix)
            self.count = owner.count
            self.passes.is_single = False
            self.results.batch_size = self.groups.count
            name = describe(self.used[0]) if self.used else "a mark"
            self._source = f"{name} with input {tuple(x.shape)}"
        elif owner.count != self.count:
            self.refuse_rows(x)

    def layer(self, rule: LayerRule, inputs: Any, *parameters: Tensor | None) -> Any:
        """Call a function of examples and parameters as a captured one.

        Args:
            rule: The function.
            inputs: Its input of examples, or several.
            parameters: Its parameter arguments; `None` where one is absent.

        Returns:
            Its result; `NotImplemented` if an example's elements lie within what the function takes
            for one row.
        """
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        x = several[0]
        facts = self.facts(x)
        if facts.kind == FOREIGN:
            self.refuse_rows(x)
        if facts.kind != EXAMPLES:
            return NotImplemented
        for p in parameters:
            if p is not None and p.is_complex():
                return NotImplemented
        owner = facts.owner
        if owner.count != self.count or type(owner) is Lost:
            self.settle(owner, x)
        if facts.soft == 2:
            self._facts.put(x, Facts(EXAMPLES, owner, soft=1))  # it told the batch
        name = self.function_name if type(owner) is Ids else ""
        rows = rows_of(tuple(x.shape), owner, rule.features, self.groups, x.device, name)
        if rows is None:
            self.inside = x
            return NotImplemented
        found = self.apply(rule, rows, several, parameters)
        if type(rows) is First and type(found) is Tensor:
            # All rows stay where they are, and the first dimension is the batch.
            self._facts.put(found, Facts(EXAMPLES, regular_at(found.shape, 0, 1, owner.count)))
        return found

    def apply(
        self, rule: Any, rows: Any, inputs: Sequence[Tensor], parameters: Sequence[Tensor | None]
    ) -> Any:
        """Run `CapturedLayer`."""
        if is_autocast_enabled() or not self.request.gradients:
            self.expect_plain(inputs)
        arguments: list[ParameterArgument | None] = []
        values: list[Any] = []
        leaves: list[Tensor] = []
        for p in parameters:
            argument = None if p is None else self._argument(p)
            arguments.append(argument)
            if p is None or argument is None or argument.source is None:
                values.append(p)
            else:
                values.append(self._stand_in(p))
                leaves += [leaf for _, leaf in argument.uses]
        call = LayerCall(rule, next(self._calls), self.passes, arguments, len(inputs), rows)
        measured, passes = self.results.measured, self.passes
        if passes.seen and not passes.running and not measured.isdisjoint(call.names):
            self.refuse(
                "expected one forward and backward pass in a block, got a second",
                "open the block inside the loop or closure, around one forward and backward pass",
            )
        passes.reruns = passes.reruns or are_saved_otherwise()
        found = apply_layer(call, *inputs, *values, *leaves)
        if type(found) is not Tensor or (inputs and type(inputs[0]) is not Tensor):
            call.layouts = layouts_of(call, (*inputs, *values), found)
        for name in call.names:
            if name not in measured:
                measured.add(name)
                if not self.results.parameters[name].shape:  # of a lazy parameter perhaps
                    self.results.parameters[name] = self._info_of(self.parameters[name])
        if self.across is not None and self.request.aggregate is not None:
            note_averaged(self.across, call.names, self.parameters, self.refuse)
            if self._unsharded is not None:
                self._unsharded.note_averaged(self.across, call.names, self.parameters, self.refuse)
        return found

    def expect_plain(self, inputs: Sequence[Tensor]) -> None:
        """Refuse what is not known of autocast, or of other processes."""
        for x in inputs:
            expect_no_autocast(x, self.refuse)
        if not self.request.gradients:
            expect_no_sync(self.refuse)
            self._expect_not_sharded(self.used)

    def _expect_not_sharded(self, names: Iterable[str]) -> None:
        """Refuse gradients that are made after the pass, if FSDP2 reduces them in it."""
        request, unsharded = self.request, self._unsharded
        later = not request.gradients and not request.outputs  # and not only measured
        if not later or unsharded is None or unsharded.names.isdisjoint(names):
            return
        if self.across is None:
            refuse_sharded(unsharded.names.intersection(names), self.function)
        # They are brought to the shards, each of which has to be of the same rule.
        unsharded.expect_same_ranks(self.across, names, self.parameters, self.refuse)

    def leave(self, error: type[BaseException] | None) -> None:
        """End the block for the other processes too; an error here is told to them.

        Raises:
            RanksError: Another one has raised an error, or runs a pass that this one has not.
        """
        if self.across is not None:
            self.across.leave(error)

    def _argument(self, p: Tensor) -> ParameterArgument | None:
        found = self._leaves.get(id(p))
        if found is not None:
            return found
        name = self._names.get(id(p))
        if name is not None:
            found = ParameterArgument(p.dtype, ((name, p),), None)
            self._leaves[id(p)] = found
            return found
        if not p.requires_grad and self._facts.get(p) is None:
            return None
        facts = self.facts(p)
        if facts.kind != PARAMETERS or facts.derived is None:
            return ParameterArgument(p.dtype, (), None) if p.requires_grad else None
        source = facts.derived.source
        uses = tuple(self._uses(source))
        if not uses:
            return None
        edge = get_gradient_edge(source)
        return ParameterArgument(p.dtype, uses, source, edge, source._version)

    def _stand_in(self, p: Tensor) -> Tensor:
        derived = self.facts(p).derived
        return derived.stand_in

    def make(self, function: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        """Apply a function to a parameter, or to a tensor made of some."""
        return self.dispatch(function, (p,), {})

    def cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in another dtype; a parameter keeps gradients of its own dtype."""
        if value.dtype == dtype:
            return value
        facts = self.facts(value)
        if facts.kind != PARAMETERS:
            found = value.to(dtype)
            self._facts.put(found, facts)
            return found
        version, found = self._casts.get((id(value), dtype), (-1, value))
        if version != value._version:
            source = value if facts.derived is None else facts.derived.source
            found = value.detach().to(dtype)
            self._facts.put(found, Facts(PARAMETERS, derived=Derived(source, None, found)))
            self._casts[id(value), dtype] = value._version, found
        return found

    # Errors.

    @property
    def function_name(self) -> str:
        """The function being called, as users write it."""
        return "" if self.function is None else function_name(self.function)

    def refuse(self, why: str, fix: str) -> NoReturn:
        """Raise the `UnsupportedError` for the torch function being called."""
        raise unsupported(self.used, self.function, why, fix)

    def refuse_lost(self, owner: Lost, x: Tensor) -> NoReturn:
        """Refuse a tensor whose owner is not known."""
        if owner.function in (NESTED, SPARSE):
            dense = (
                "torch.nested.to_padded_tensor(x, 0)"
                if owner.function == NESTED
                else "x.to_dense()"
            )
            self.refuse(
                f"its input is {owner.function}, in which examples cannot be followed",
                f"give it a dense tensor: {dense}",
            )
        if owner.function == VMAP:
            self.refuse(
                "it is called inside torch.vmap, where the examples cannot be told apart",
                "call the model on the batch, without torch.vmap",
            )
        if owner.mixed:
            self.refuse(
                f"several examples have a part in each element of its input {tuple(x.shape)}, "
                f"mixed over the batch by {owner.function}",
                "keep examples apart until the loss is taken; weight losses before their mean; "
                "leave an L2 penalty to the optimizer's weight_decay, and take others outside the "
                "block; or say with pc.mark_examples whose elements its input holds",
            )
        self.refuse(
            f"where the batch is in its input {tuple(x.shape)} is not known after {owner.function}",
            "keep the batch first in all layers; describe that function with pc.register_rule; or "
            "say with pc.mark_examples(x, dim=...) whose elements the input holds",
        )

    def refuse_rows(self, x: Tensor) -> NoReturn:
        """Refuse a tensor with other rows than the batch."""
        rows = x.shape[0] if x.dim() else 1
        self.refuse(
            f"its input {tuple(x.shape)} has {rows} rows, but the batch size of this block is "
            f"{self.count}, as set by {self._source}",
            "keep the batch first in every input, or say with pc.mark_examples(x, dim=...) which "
            "dimension it is; dim=None says that all examples share x",
        )


def _unwrapped(args: Any, kwargs: Any, seen: list[tuple[Tensor, Facts]]) -> tuple[Any, Any, Any]:
    """Arguments without the node by which FSDP2 frees the parameters of a module.

    Tensors that are made of parameters alone take their gradients back in a pass of their own, in
    which that node would come too early.
    """
    new = {
        id(x): f.derived.source
        for x, f in seen
        if f.derived is not None and is_post_backward(x.grad_fn)
    }
    if not new:
        return args, kwargs, seen
    return replaced(args, new), replaced(kwargs, new), [(new.get(id(x), x), f) for x, f in seen]


def info_of(p: Tensor) -> ParameterInfo:
    """Shape, dtype and device of a parameter; a lazy one has no shape yet."""
    # To ask a plain parameter whether it is another kind takes as long as all the rest.
    is_lazy = type(p) is not nn.Parameter and isinstance(p, UninitializedParameter)
    shape = () if is_lazy else tuple(p.shape)
    layout = None if type(p) is nn.Parameter else Layout.of(p)
    return ParameterInfo(shape, p.dtype, p.device, layout)


def _only_along(owner: Owner, dim: int, shape: tuple[int, ...]) -> bool:
    """Whether an owner varies along one dimension alone, or not at all."""
    return not isinstance(owner, Lost) and set(dims_of_owner(owner, shape)) <= {dim}


def _lasts(owners: Sequence[Owner | None], results: Sequence[Tensor], rule: Rule) -> bool:
    """Whether the owners of results would be the same if they were asked for again."""
    if any(x.shape[:1] == (0,) or x.layout != torch.strided for x in results):
        return False
    return not any(type(o) is Ids or (o is None and rule.writes) for o in owners)


def _draws(rule: Rule, args: Any, kwargs: Any) -> bool:
    """Whether a function draws numbers, or would give others if it were called again."""
    if rule.name == "scaled_dot_product_attention" and given(args, kwargs, 4, "dropout_p", 0.0):
        return True
    return rule.name in _DRAWS or is_autocast_enabled()


def _frozen(value: Any) -> Any:
    """Nested arguments in containers that no one else can change."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_frozen, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    return value


def _versions(args: Any, kwargs: Any) -> int:
    return sum(version_of(x) for x in tensors((args, kwargs)))
