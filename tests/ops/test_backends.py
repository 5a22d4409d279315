"""Every op, backend and dtype against the reference in float64, on the samples of the registry."""

import pytest
import torch
from backends import TOLERANCE, assert_close, assert_reduced_close, describe, in_float64, op_cases
from torch import Tensor

import pycoherence as pc


@pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(op_cases()))
def test_agrees_with_the_reference_in_float64(
    op: str, device: str, backend: str, dtype: torch.dtype
) -> None:
    spec = pc.ops.specs[op]
    for args in spec.samples(device, dtype):
        with pc.backend(backend):
            actual = getattr(torch.ops.pycoherence, op)(*args)
        expected = spec.reference(*in_float64(args))
        if isinstance(actual, Tensor):
            assert_close(actual, expected, TOLERANCE[dtype], describe(args))
        else:
            assert_reduced_close(actual, expected, TOLERANCE[dtype], describe(args))


@pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(op_cases()))
def test_outputs_are_fresh_and_contiguous(
    op: str, device: str, backend: str, dtype: torch.dtype
) -> None:
    """Of the accumulation dtype, on the right device, sharing no memory with the arguments."""
    expected = dtype
    if op != "identity":
        expected = torch.float64 if dtype == torch.float64 else torch.float32
    for args in pc.ops.specs[op].samples(device, dtype):
        with pc.backend(backend):
            out = getattr(torch.ops.pycoherence, op)(*args)
        used = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor) and x.numel()}
        for one in [out] if isinstance(out, Tensor) else out:
            assert one.device.type == device
            assert one.numel() == 0 or one.dtype == expected
            assert one.is_contiguous()
            assert one.untyped_storage().data_ptr() not in used


@pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(op_cases()))
def test_is_bitwise_repeatable(op: str, device: str, backend: str, dtype: torch.dtype) -> None:
    for args in pc.ops.specs[op].samples(device, dtype):
        with pc.backend(backend):
            first, second = (getattr(torch.ops.pycoherence, op)(*args) for _ in range(2))
        pairs = [(first, second)] if isinstance(first, Tensor) else zip(first, second, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(op_cases()))
def test_arguments_are_left_alone(op: str, device: str, backend: str, dtype: torch.dtype) -> None:
    for args in pc.ops.specs[op].samples(device, dtype):
        before = [x.clone() if isinstance(x, Tensor) else x for x in args]
        with pc.backend(backend):
            getattr(torch.ops.pycoherence, op)(*args)
        for x, copy in zip(args, before, strict=True):
            assert torch.equal(x, copy) if isinstance(x, Tensor) else x == copy
