"""Per-example gradients built one by one with autograd, and their reductions by loops."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced
from support.backends import backends_of


def gradients(forward: Callable[[Tensor, int], Tensor], shape: Sequence[int], g: Tensor) -> Tensor:
    """`[B, *shape]` in float64.

    Args:
        forward: `forward(weight, b)`, what a layer makes of example b, like `g[b : b + 1]`.
        shape: Shape of the weight.
        g: Gradient with respect to what `forward` gives, for all examples.
    """
    rows = torch.zeros(len(g), *shape, dtype=torch.float64)
    for b in range(len(g)):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        out = forward(weight, b)
        if out.requires_grad:
            (rows[b],) = torch.autograd.grad(out, weight, g[b : b + 1].double())
    return rows


def reductions(
    rows: Tensor, want: Sequence[str], coef: Tensor | None, direction: Tensor | None
) -> Reduced:
    """What a `*_reduce` op says of gradients `[B, *shape]`."""
    found: dict[str, Tensor] = {}
    for name in want:
        b = len(rows)
        sizes = {"sq_norms": (b,), "dots": (b,), "sum_dots": (b,), "gram": (b, b)}
        found[name] = torch.zeros(sizes.get(name, rows.shape[1:]), dtype=torch.float64)
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for b, row in enumerate(rows):
        weight = 1.0 if coef is None else coef[b].double()
        if "sq_norms" in found:
            found["sq_norms"][b] = row.square().sum()
        if "dots" in found:
            assert direction is not None
            found["dots"][b] = (row * direction.double()).sum()
        if weight != 0:
            total += weight * row
        if "second_moment" in found:
            found["second_moment"] += row.square()
        if "sign_sum" in found:
            found["sign_sum"] += torch.where(row.isnan(), row, row.sign())
    if "weighted_sum" in found:
        found["weighted_sum"] = total
    for b, row in enumerate(rows):
        if "sum_dots" in found:
            found["sum_dots"][b] = (row * total).sum()
        for c, other in enumerate(rows):
            if "gram" in found:
                found["gram"][b, c] = (row * other).sum()
    return Reduced(*(found.get(name) for name in Reduced._fields))


def assert_exactly(
    op: str, call: Callable[[], Reduced], rows: Tensor, tail: Mapping[str, Any]
) -> None:
    """On every backend that has the op, the call gives the reductions of `rows`, to the bit.

    Args:
        op: Name of the op.
        call: Runs it.
        rows: Gradients of whole numbers, `[B, *shape]`.
        tail: The arguments `want`, `coef` and `direction` of the call.
    """
    expected = reductions(rows, tail["want"], tail.get("coef"), tail.get("direction"))
    for backend in backends_of(op):
        with pc.backend(backend):
            actual = call()
        for name, ours, truth in zip(Reduced._fields, actual, expected, strict=True):
            assert (ours is None) == (truth is None), (backend, name)
            if ours is not None and truth is not None:
                assert torch.equal(ours.double(), truth), (backend, name)


def assert_gram_exactly(op: str, call: Callable[[], Tensor], one: Tensor, two: Tensor) -> None:
    """On every backend that has the op, the call gives the dot products of rows, to the bit.

    Args:
        op: Name of the op.
        call: Runs it.
        one: Gradients of whole numbers, `[B1, *shape]`.
        two: The same of the second batch.
    """
    expected = torch.zeros(len(one), len(two), dtype=torch.float64)
    for b, row in enumerate(one):
        for c, other in enumerate(two):
            expected[b, c] = (row * other).sum()
    for backend in backends_of(op):
        with pc.backend(backend):
            assert torch.equal(call().double(), expected), backend
