"""Odd strides and lazily negated tensors give what their contiguous copies give."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.backends import assert_reduced_close, dtypes_of, places_of
from support.strategies import LAYOUTS, lay_out
from torch import Tensor

import pycoherence as pc

WANT = ("sq_norms", "weighted_sum", "second_moment")


def calls(op: str, dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., object]]:
    """The tensors that an op reads, and the call that takes them."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    if op == "linear_reduce":
        return [randn(3, 6, 7), randn(3, 6, 5)], lambda x, g: pc.ops.linear_reduce(x, g, want=WANT)
    if op == "conv_reduce":
        tensors = [randn(3, 4, 6, 5), randn(3, 2, 4, 4)]
        return tensors, lambda x, g: pc.ops.conv_reduce(x, g, (3, 2), groups=2, want=WANT)
    if op == "embedding_reduce":
        ids = torch.randint(4, (3, 6))
        return [randn(3, 6, 5)], lambda g: pc.ops.embedding_reduce(ids, g, 4, want=WANT)
    tensors = [randn(3, 6, 5), randn(3, 6, 5), randn(3, 6, 1), randn(3, 6, 1)]
    return tensors, lambda *tensors: pc.ops.affine_reduce(*tensors, want=WANT)


def cases() -> Iterator[Any]:
    for op in pc.ops.specs:
        if op.endswith("_reduce"):
            for place in places_of(op):
                yield pytest.param(op, *place.values, id=f"{op}-{place.id}", marks=place.marks)


each_case = pytest.mark.parametrize(("op", "backend"), list(cases()), indirect=["backend"])


@pytest.mark.parametrize("layout", LAYOUTS)
@each_case
def test_strides_change_nothing(op: str, backend: str, layout: str) -> None:
    for dtype in dtypes_of(backend).values():
        tensors, call = calls(op, dtype)
        expected = call(*tensors)
        assert_reduced_close(call(*(lay_out(x, layout) for x in tensors)), expected, 1e-6)


@each_case
def test_expanded_tensors_change_nothing(op: str, backend: str) -> None:
    tensors, call = calls(op, torch.float32)
    for dim in (0, 1):
        expanded = [x.narrow(dim, 0, 1).expand(x.shape) for x in tensors]
        expected = call(*(x.contiguous() for x in expanded))
        assert_reduced_close(call(*expanded), expected, 1e-6)


@each_case
def test_a_pending_negation_is_carried_out(op: str, backend: str) -> None:
    """The imaginary part of a conjugate is stored with the other sign and a bit that says so."""
    tensors, call = calls(op, torch.float32)
    lazy = [torch.complex(x, -x).conj().imag for x in tensors]
    assert all(x.is_neg() for x in lazy)
    assert_reduced_close(call(*lazy), call(*tensors), 1e-6)
