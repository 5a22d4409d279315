"""The autograd graph, as a backward pass will walk it."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction


def graph_below(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node that a backward pass from `roots` may run, once; not those that fill leaves."""
    seen: set[Any] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [below for below, _ in node.next_functions if type(below) is not _FillLeaf]


def _fill_leaf() -> type:
    node = torch.empty(0, requires_grad=True).clone().grad_fn
    assert node is not None
    return type(node.next_functions[0][0])


_FillLeaf = _fill_leaf()


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether the node runs a forward and a backward pass of its own."""
    return isinstance(node, CheckpointFunction._backward_cls)


def is_custom(node: Any) -> bool:
    """Whether the node runs code in Python."""
    return isinstance(node, BackwardCFunction)


@contextmanager
def counted_gradients(parameters: Mapping[str, Tensor]) -> Iterator[Counter[str]]:
    """Count how often a gradient is added to each parameter while the block lasts."""
    counts: Counter[str] = Counter()
    names = {id(p): name for name, p in parameters.items()}

    def count(p: Tensor) -> None:
        counts[names[id(p)]] += 1

    bare = [p for p in parameters.values() if p._post_accumulate_grad_hooks is None]
    try:
        for p in bare:
            # As torch does when it registers a hook, in less time.
            setattr(p, "_post_accumulate_grad_hooks", OrderedDict())  # noqa: B010
        for p in parameters.values():
            _hooks(p)[_COUNTER] = count
        yield counts
    finally:
        for p in parameters.values():
            _hooks(p).pop(_COUNTER, None)
        for p in bare:
            if not _hooks(p):
                setattr(p, "_post_accumulate_grad_hooks", None)  # noqa: B010


def _hooks(parameter: Tensor) -> dict[Any, Any]:
    hooks = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


_COUNTER = "pycoherence"
