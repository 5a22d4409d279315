"""Any function of parameters and examples, one example at a time."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pycoherence.capture.autocast import same_autocast, without_autocast
from pycoherence.capture.context import CallContext
from pycoherence.capture.errors import function_name
from pycoherence.capture.facts import (
    EXAMPLES,
    PARAMETERS,
    Facts,
    Regular,
    along,
    regular_at,
    tensors,
)
from pycoherence.capture.groups import Groups
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.rows import Rows
from pycoherence.ops import workspace
from pycoherence.sites import Site, of_rows


class Function:
    """A torch function of tensors alone: first those of examples, then parameters and others."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        kind_of: Callable[[Tensor], int],
    ) -> None:
        self._function = function
        self._autocast = same_autocast(arguments)
        self._leaves, self._spec = tree_flatten(arguments)
        at = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self._parameters = [i for i in at if kind_of(self._leaves[i]) == PARAMETERS]
        self._others = [i for i in at if i not in self._parameters]
        self.result: TreeSpec | None = None

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters and the other tensors, which are no longer kept here."""
        found = [[self._leaves[i] for i in at] for at in (self._parameters, self._others)]
        for i in (*self._parameters, *self._others):
            self._leaves[i] = None
        return found[0], found[1]

    def __call__(self, parameters: Any, others: Any) -> tuple[Tensor, ...]:
        """The tensors among its results."""
        leaves = list(self._leaves)
        for at, values in ((self._parameters, parameters), (self._others, others)):
            for i, value in zip(at, values, strict=True):
                leaves[i] = value
        args, kwargs = cast(tuple[Any, Any], tree_unflatten(leaves, self._spec))
        with self._autocast():
            found, self.result = tree_flatten(self._function(*args, **kwargs))
        return tuple(found)


class ExampleByExample(LayerRule):
    """Makes the gradient of each example by `torch.func.vmap`, or by a masked pass of its own."""

    def __init__(
        self, run: Function, dims: list[int | None], count: int, groups: Groups, others: int
    ) -> None:
        self._run, self._dims = run, dims
        self._count, self._groups, self._others = count, groups, others
        self.places: list[int] = []

    def forward(self, *values: Tensor) -> tuple[Any, Kept]:
        others, parameters = values[: self._others], values[self._others :]
        found = self._run(parameters, others)
        out = [x.clone() if any(x is y for y in values) or x._is_view() else x for x in found]
        return (out[0] if len(out) == 1 else tuple(out)), values

    def input_grads(self, needed: Sequence[bool], g: Any, *kept: Any) -> Sequence[Tensor | None]:
        others, parameters = kept[: self._others], kept[self._others :]
        grads = g if isinstance(g, tuple) else (g,)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(n) for x, n in zip(others, needed, strict=True)]
            found = self._run([p.detach() for p in parameters], inputs)
            pairs = [
                (x, y)
                for x, y in zip(found, grads, strict=True)
                if x.requires_grad and y is not None
            ]
            if not pairs:
                return (None,) * len(others)
            outputs, weights = zip(*pairs, strict=True)
            wanted = [x for x in inputs if x.requires_grad]
            made = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
        return tuple(next(made) if n else None for n in needed)

    def factors(self, rows: Rows, g: Any, *kept: Any) -> Sequence[Site | None]:
        others, parameters = kept[: self._others], kept[self._others :]
        grads = g if isinstance(g, tuple) else (g,)
        if not self._count:
            found = [p.new_zeros((0, *p.shape)) for p in parameters]
        else:
            try:
                found = self._by_vmap(parameters, others, grads)
            except (RuntimeError, ValueError, NotImplementedError):
                found = self._by_masks(parameters, others, grads)
        return [of_rows(self._groups.sums(x)) for x in found]

    def _by_vmap(
        self, parameters: Sequence[Tensor], others: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        dims, places = self._dims, self.places

        def one(others: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            alone = list(others)

            def outputs(*parameters: Tensor) -> tuple[Tensor, ...]:
                return tuple(x for x in self._run(parameters, alone) if _flows(x))

            pull = torch.func.vjp(outputs, *parameters)[1]
            return pull(grads)

        pairs = [(y, d) for y, d in zip(grads, places, strict=True) if y is not None and _flows(y)]
        floating = [d for _, d in pairs]
        size = sum(p.numel() * p.itemsize for p in parameters)
        step = max(1, workspace(parameters[0].device) // max(1, size))
        vmapped = torch.func.vmap(one, in_dims=(tuple(dims), tuple(floating)), chunk_size=step)
        n = self._count
        cut = [
            x if d is None else x.unflatten(d, (n, x.shape[d] // n))
            for x, d in zip(others, dims, strict=True)
        ]
        return list(
            vmapped(tuple(cut), tuple(y.unflatten(d, (n, y.shape[d] // n)) for y, d in pairs))
        )

    def _by_masks(
        self, parameters: Sequence[Tensor], others: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in parameters]
            outputs = self._run(leaves, others)
        triples = [
            (x, y, d)
            for x, y, d in zip(outputs, grads, self.places, strict=True)
            if x.requires_grad and y is not None
        ]
        found = [p.new_zeros((self._count, *p.shape)) for p in parameters]
        for b in range(self._count):
            masked = []
            for _, y, d in triples:
                mask = torch.zeros_like(y)
                each_n = y.shape[d] // self._count
                part = y.narrow(d, b * each_n, each_n)
                mask.narrow(d, b * each_n, each_n).copy_(part)
                masked.append(mask)
            each = torch.autograd.grad(
                [x for x, _, _ in triples], leaves, masked, retain_graph=True, allow_unused=True
            )
            for total, grad in zip(found, each, strict=True):
                if grad is not None:
                    total[b] = grad
        return found


def _flows(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def example_by_example(
    c: CallContext,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: list[tuple[Tensor, Facts]],
    *,
    always: bool,
) -> Any:
    """Call a function whose per-example gradients are made one by one.

    Args:
        c: The capture.
        function: Nobody has described its gradients.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        seen: The tensors among them.
        always: Whether to do so whatever memory it takes.

    Returns:
        Its result; `NotImplemented` if the gradients would not fit the workspace, or if it is not
        known where the examples are in its arguments or results.
    """
    kinds = {id(x): f for x, f in seen}
    run = Function(function, (args, kwargs), lambda x: kinds[id(x)].kind)
    parameters, others = run.take()
    owned = [(x, kinds[id(x)].owner) for x in others if kinds[id(x)].kind == EXAMPLES]
    count = owned[0][1].count
    size = sum(p.numel() * p.itemsize for p in parameters) * count
    if not always and size > workspace(parameters[0].device):
        return NotImplemented
    dims: list[int | None] = []
    for x in others:
        facts = kinds[id(x)]
        if facts.kind != EXAMPLES:
            dims.append(None)
            continue
        d = _batch_dim(x, facts, count)
        if d is None:
            return NotImplemented
        dims.append(d)
    c.settle(owned[0][1], owned[0][0])
    with without_autocast(owned[0][0]):
        rule = ExampleByExample(run, dims, count, c.groups, len(others))
        places = _places(run, parameters, others, dims, count)
        if places is None:
            return NotImplemented
        rule.places = places
        name = function_name(function)
        for used in c.used:
            c.results.fallbacks.setdefault(used, f"{name}: gradients [B, ...] example by example")
        found = c.apply(rule, None, others, parameters)
    out = found if isinstance(found, tuple) else (found,)
    for x, d in zip(out, places, strict=True):
        c.mark(
            x,
            Regular(1, 1)
            if count == 1
            else regular_at(tuple(x.shape), d, x.shape[d] // max(1, count), count),
        )
    assert run.result is not None
    return tree_unflatten(list(out), run.result)


def _batch_dim(x: Tensor, facts: Facts, count: int) -> int | None:
    """The dimension of the examples, if each has one run of indices, all equally long."""
    if not isinstance(facts.owner, Regular) or not x.dim():
        return None
    if count == 1:
        return 0
    place = along(tuple(x.shape), facts.owner)
    if place is None or x.shape[place[0]] != count * place[1]:
        return None
    return place[0]


def _places(
    run: Function,
    parameters: Sequence[Tensor],
    others: Sequence[Tensor],
    dims: Sequence[int | None],
    count: int,
) -> list[int] | None:
    """Which dimension of each result is the batch: the one that is 1 for the first example alone.

    The results of each example have to be those of the batch, too.
    """
    if not count:
        return [0 for _ in _run_plain(run, parameters, others)]
    try:
        whole = _run_plain(run, parameters, others)
        found = _compared(run, parameters, others, dims, count, 0, whole)
        for b in range(1, count):
            if found is None or _compared(run, parameters, others, dims, count, b, whole) != found:
                return None
    except (RuntimeError, ValueError, IndexError):
        return None
    return found


def _compared(
    run: Function,
    parameters: Sequence[Tensor],
    others: Sequence[Tensor],
    dims: Sequence[int | None],
    count: int,
    example: int,
    whole: Sequence[Any],
) -> list[int] | None:
    """Which dimensions of the results are the batch, by what one example alone gives."""
    alone = [
        x if d is None else x.narrow(d, example * (x.shape[d] // count), x.shape[d] // count)
        for x, d in zip(others, dims, strict=True)
    ]
    one = _run_plain(run, parameters, alone)
    found: list[int] = []
    for a, b in zip(one, whole, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
            return None
        differ = [d for d in range(a.dim()) if a.shape[d] != b.shape[d]]
        if count == 1 and a.dim():
            differ = [0]
        if len(differ) != 1:
            return None
        at = differ[0]
        if b.shape[at] != count * a.shape[at]:
            return None
        same = torch.allclose(
            a.to(torch.complex128),
            b.narrow(at, example * a.shape[at], a.shape[at]).to(torch.complex128),
            1e-3,
            1e-5,
            equal_nan=True,
        )
        if not same:
            return None
        found.append(at)
    return found


def _run_plain(
    run: Function, parameters: Sequence[Tensor], others: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return run([p.detach() for p in parameters], others)


__all__ = ["example_by_example", "prod", "tensors"]
