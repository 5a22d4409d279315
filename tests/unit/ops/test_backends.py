"""Every op, backend and dtype against the reference in float64, on the samples of the registry."""

from typing import Any, NamedTuple

import pytest
import torch
from support.backends import (
    TOLERANCE,
    assert_close,
    assert_reduced_close,
    describe,
    each_tensor,
    in_float64,
    op_cases,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pycoherence as pc
from pycoherence.ops.core.dispatch import explain
from pycoherence.ops.core.spec import tensors_of

Args = tuple[Any, ...]


class Ran(NamedTuple):
    """The calls of an op on its samples: copies of the arguments, themselves, and the outputs."""

    op: str
    device: str
    backend: str
    dtype: torch.dtype
    calls: list[tuple[Args, Args, Any]]


def run(op: str, backend: str, args: Args) -> Any:
    with pc.backend(backend):
        return getattr(torch.ops.pycoherence, op)(*args)


# One run for all tests that look at it; pytest puts those of one run next to each other.
@pytest.fixture(scope="module", params=list(op_cases()))
def ran(request: pytest.FixtureRequest) -> Ran:
    op, device, backend, dtype = request.param
    calls = []
    for args in pc.ops.specs[op].samples(device, dtype):
        if explain(pc.ops.specs[op], device, args)[backend]:
            continue  # as it says in the error; tests of the picker read that
        before = each_tensor(torch.clone, args)
        calls.append((before, args, run(op, backend, args)))
    assert calls
    return Ran(op, device, backend, dtype, calls)


def outputs(out: Any) -> list[Tensor]:
    """Those that were asked for."""
    return list(tensors_of([out]))


def test_agrees_with_the_reference_in_float64(ran: Ran) -> None:
    for _, args, actual in ran.calls:
        expected = pc.ops.specs[ran.op].reference(*in_float64(args))
        if ran.op.endswith("_reduce"):
            assert_reduced_close(actual, expected, TOLERANCE[ran.dtype], describe(args))
            continue
        for ours, truth in zip(outputs(actual), outputs(expected), strict=True):
            assert_close(ours, truth, TOLERANCE[ran.dtype], describe(args))


def test_outputs_are_fresh_and_contiguous(ran: Ran) -> None:
    """Of the accumulation dtype, on the right device, sharing no memory with the arguments."""
    expected = ran.dtype
    if ran.op != "identity":
        wide = ran.dtype == torch.float64 or ran.op == "row_sq_norms"
        expected = torch.float64 if wide else torch.float32
    for _, args, out in ran.calls:
        used = {x.untyped_storage().data_ptr() for x in tensors_of(args) if x.numel()}
        for one in outputs(out):
            assert one.device.type == ran.device
            assert one.dtype == expected
            assert one.is_contiguous()
            assert one.untyped_storage().data_ptr() not in used


def test_arguments_are_left_alone(ran: Ran) -> None:
    for before, args, _ in ran.calls:
        for x, copy in zip(tree_leaves(args), tree_leaves(before), strict=True):
            assert torch.equal(x, copy) if isinstance(x, Tensor) else x == copy


def test_is_bitwise_repeatable(ran: Ran) -> None:
    for _, args, first in ran.calls:
        pairs = zip(outputs(first), outputs(run(ran.op, ran.backend, args)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
