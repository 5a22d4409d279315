"""Reads from the graph of a loss by which number a host has multiplied it, before it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pycoherence.capture.blocks import current

_MEAN, _SUM = 1, 2
"""`at::Reduction`, as nodes of torch save it."""


class Averages(NamedTuple):
    """The terms that a loss is the average of.

    Attributes:
        targets: How many targets it has, those that it ignores among them.
        weight: The total weight of those that count, if the loss is one cross entropy.
    """

    targets: int
    weight: float | None


def edge_of(x: Tensor) -> GradientEdge:
    """The place of a tensor in the graph, whatever is written into it later."""
    with torch._C.DisableTorchFunction():
        return get_gradient_edge(x)


def derivatives(root: Tensor, edges: Sequence[GradientEdge]) -> list[float | None]:
    """The derivatives of a loss by numbers that it is computed from; `None` by others.

    Only what lies between is run.
    """
    if not edges:
        return []
    found = torch.autograd.grad(root, edges, retain_graph=True, allow_unused=True)
    return [None if g is None else g.item() for g in found]


def averages(loss: GradientEdge) -> Averages | None:
    """The terms that a loss is the average of; `None` if a part of it is not known to be one."""
    found = [_average(node) for node in _reductions(loss)]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    if len(known) == 1:
        return known[0]
    return Averages(max(one.targets for one in known), None)


def only_sum(loss: GradientEdge) -> GradientEdge | None:
    """The sum that a loss is computed from, if it is one sum."""
    found = _reductions(loss)
    if len(found) != 1 or not _is_sum(found[0]):
        return None
    return GradientEdge(found[0], 0)


def batch_size() -> int:
    """How many examples the forward pass of the open block has shown."""
    size = current().results.batch_size
    return 1 if size is None else size  # a batch of one is measured by its parameters' gradients


def _reductions(loss: GradientEdge) -> list[Node]:
    """The losses and other functions that make one number of many, below numbers alone."""
    found, seen, todo = list[Node](), set[Node](), [loss.node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        below = [(other, at) for other, at in node.next_functions if other is not None]
        numbers = [other for other, at in below if _is_number(other, at)]
        # That of one example may take a number as well.
        if len(numbers) < len(below) or _is_loss(node):
            found.append(node)
        else:
            todo += numbers
    return found


def _is_loss(node: Any) -> bool:
    return hasattr(node, "_saved_reduction") or node.name().startswith("MeanBackward")


def _is_sum(node: Any) -> bool:
    is_sum = node.name().startswith("SumBackward")
    return is_sum or getattr(node, "_saved_reduction", None) == _SUM


def _is_number(node: Any, at: int) -> bool:
    return tuple(node._input_metadata[at].shape) == ()


def _average(node: Any) -> Averages | None:
    """The terms that a function averages, if it is known to."""
    if not _is_loss(node) or getattr(node, "_saved_reduction", _MEAN) != _MEAN:
        return None
    if not node.name().startswith("NllLoss"):
        return Averages(0, None)
    return Averages(node._saved_target.numel(), node._saved_total_weight.item())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute of an object be another one."""
    own, missing = vars(owner), object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            own.pop(name, None)
        else:
            own[name] = before
