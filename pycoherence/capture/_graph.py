"""The autograd graph, as a backward pass will walk it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def counted_gradients(parameters: Mapping[str, Tensor]) -> Iterator[Counter[str]]:
    """Count how often a gradient is added to each parameter while the block lasts."""
    counts: Counter[str] = Counter()
    before = {name: p._post_accumulate_grad_hooks for name, p in parameters.items()}
    handles = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: counts.update((name,)))
        for name, p in parameters.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            if before[name] is None:
                setattr(p, "_post_accumulate_grad_hooks", None)  # noqa: B010
