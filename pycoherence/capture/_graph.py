"""The autograd graph, as a backward pass will walk it."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


def graph_below(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node that a backward pass from `roots` may run, once."""
    seen: set[Any] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(below for below, _ in node.next_functions)


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether the node runs a forward and a backward pass of its own."""
    return isinstance(node, CheckpointFunction._backward_cls)
