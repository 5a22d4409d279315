"""Which implementations there are to test, and how close to the truth they must come."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import pycoherence as pc
from pycoherence.ops import BACKENDS, Reduced
from pycoherence.ops.core.dispatch import interpreted, unavailable

DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}

# Half precision inputs are exact in float32, in which they are added up.
TOLERANCE = {
    torch.float16: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def backends_of(op: str, device: str = "cpu") -> list[str]:
    """Backends that have an implementation of an op; the reference is always one."""
    if device == "cuda" and not torch.cuda.is_available():
        return ["reference"]
    # Loading the library is what makes its kernels known.
    return [name for name in BACKENDS if unavailable(op, name, device) is None]


def places_of(op: str) -> Iterator[Any]:
    """Device and backend for each implementation of an op: parameters of the fixture `backend`."""
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for name in backends_of(op, device):
            yield pytest.param((device, name), id=f"{device}-{name}", marks=marks)


def on_each_place(op: str) -> pytest.MarkDecorator:
    """A test runs once for each implementation of an op, by the fixture `backend`."""
    return pytest.mark.parametrize("backend", list(places_of(op)), indirect=True)


def on_each_cpu_backend(op: str) -> pytest.MarkDecorator:
    """The same on the CPU alone."""
    return pytest.mark.parametrize("backend", backends_of(op), indirect=True)


def dtypes_of(backend: str) -> dict[str, torch.dtype]:
    """Dtypes to test a backend with: Triton's interpreter computes bfloat16 wrongly."""
    wrong = ["bf16"] if backend == "triton" and interpreted() else []
    return {label: dtype for label, dtype in DTYPES.items() if label not in wrong}


def op_cases() -> Iterator[Any]:
    """Every op on every device, with every backend and dtype."""
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for name, spec in pc.ops.specs.items():
            for backend in backends_of(name, device):
                for label, dtype in dtypes_of(backend).items():
                    if dtype in spec.dtypes:
                        yield pytest.param(
                            (name, device, backend, dtype),
                            id=f"{name}-{device}-{backend}-{label}",
                            marks=marks,
                        )


def each_tensor(change: Callable[[Tensor], Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, tensors changed, those in lists too."""
    return tree_map_only(Tensor, change, args)


def each_float(change: Callable[[Tensor], Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, floating tensors changed."""
    return each_tensor(lambda x: change(x) if x.is_floating_point() else x, args)


def one_kind(outputs: Reduced | tuple[Tensor, ...]) -> Reduced:
    """Whether dot products of infinities end up as NaN or Inf depends on the order of the sum."""
    out = Reduced(*outputs)
    found = ((name, getattr(out, name)) for name in ("dots", "sum_dots", "gram"))
    nan = float("nan")
    return out._replace(**{k: x.nan_to_num(nan, nan, nan) for k, x in found if x is not None})


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, floating tensors in float64 on the CPU."""
    return each_tensor(lambda x: (x.double() if x.is_floating_point() else x).cpu(), args)


def describe(args: tuple[Any, ...]) -> str:
    """Shapes and numbers of some arguments, for messages."""
    shapes = tree_map_only(Tensor, lambda x: tuple(x.shape), args)
    return ", ".join(map(repr, shapes))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Same shape, same NaN and Inf, and no error above `tolerance` times the largest number."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere"
    assert torch.equal(actual.isinf(), expected.isinf()), f"{what}: Inf elsewhere"
    if not finite.any():
        return
    error = (actual - expected)[finite].abs().max().item()
    scale = expected[finite].abs().max().item()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


def assert_reduced_close(
    actual: Reduced | tuple[Tensor, ...],
    expected: Reduced | tuple[Tensor, ...],
    tolerance: float,
    what: str = "",
) -> None:
    """Do as `assert_close` for each output; squared norms example by example, signs exactly."""
    for name, ours, truth in zip(Reduced._fields, actual, expected, strict=True):
        where = f"{what} {name}"
        if ours is None or truth is None:
            assert ours is truth, where
        elif name == "sq_norms":
            assert ours.shape == truth.shape, where
            for b, (one, other) in enumerate(zip(ours, truth, strict=True)):
                assert_close(one, other, tolerance, f"{where}[{b}]")
        else:
            assert_close(ours, truth, 0 if name == "sign_sum" else tolerance, where)
