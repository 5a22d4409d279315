"""Reads from the graph of a loss by which number a host has multiplied it, before it runs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pycoherence.capture.blocks import current

_MEAN, _SUM = 1, 2
"""`at::Reduction`, as nodes of torch save it."""

_BY_ELEMENT = (
    "MseLoss",
    "SmoothL1Loss",
    "HuberLoss",
    "SoftMarginLoss",
    "BinaryCrossEntropyBackward",
    "BinaryCrossEntropyWithLogits",
)
"""Nodes of losses with a term for each number of their input."""

_BY_ROW = ("MultiMarginLoss", "MultilabelMarginLoss")
"""Nodes of losses with a term for each row of their input."""


class Average(NamedTuple):
    """The average of terms, as one function of torch has taken it.

    Attributes:
        shape: The shape of the terms, those that are ignored among them.
        weight: The total weight of those that count, if it is a cross entropy.
        by_element: Whether it is a loss with a term for each number of an output.
    """

    shape: tuple[int, ...]
    weight: float | None = None
    by_element: bool = False

    @property
    def terms(self) -> int:
        """How many terms there are, those that are ignored among them."""
        return math.prod(self.shape)


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


def averages(loss: GradientEdge) -> list[Average] | None:
    """The averages that a loss is computed from; `None` if a part of it is not known to be one."""
    found = [_average(node) for node in _reductions(loss)]
    known = [one for one in found if one is not None]
    return known if known and len(known) == len(found) else None


def depends_on_others(root: Tensor, loss: GradientEdge, number: Tensor | None) -> bool:
    """Whether gradients of a loss flow to others than one that it is computed from, and a number.

    Terms that have no gradient are no others.
    """
    start = edge_of(root)
    todo, seen = [(start.node, start.output_nr)], {(loss.node, loss.output_nr)}
    while todo:
        node, at = todo.pop()
        if (node, at) in seen:
            continue
        seen.add((node, at))
        below = node.next_functions
        if not below and (number is None or getattr(node, "variable", None) is not number):
            return True
        if node.name().startswith("_DDPSink"):  # which gives what it gets, one for one
            below = below[at : at + 1]
        todo += [(other, to) for other, to in below if other is not None]
    return False


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
        if stacked := _numbers_stacked(node):
            todo += stacked
        # That of one example may take a number as well.
        elif len(numbers) < len(below) or _is_loss(node):
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


def _numbers_stacked(node: Any) -> list[Node]:
    """The functions that made the numbers that a mean is taken of; none if it is of no stack."""
    if not node.name().startswith("MeanBackward"):
        return []
    (stack, _), *_ = node.next_functions
    if not stack.name().startswith("StackBackward"):
        return []
    below = [(other, at) for other, at in stack.next_functions if other is not None]
    return [other for other, at in below if _is_number(other, at)]


def _average(node: Any) -> Average | None:
    """The average that a function takes, if it is known to take one."""
    name = node.name()
    if name.startswith("MeanBackward"):
        return Average(tuple(node._saved_self_sym_sizes))
    if getattr(node, "_saved_reduction", None) != _MEAN:
        return None
    if name.startswith("NllLoss"):
        return Average(tuple(node._saved_target.shape), node._saved_total_weight.item())
    other, at = next(edge for edge in node.next_functions if edge[0] is not None)
    shape = tuple(other._input_metadata[at].shape)
    if name.startswith(_BY_ELEMENT):
        return Average(shape, by_element=True)
    return Average(shape[:-1]) if name.startswith(_BY_ROW) else None


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
