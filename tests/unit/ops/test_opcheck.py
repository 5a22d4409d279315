"""torch's own checks of a custom op, on a few samples of each op and dtype."""

from itertools import islice
from typing import Any

import pytest
import torch
from support.backends import DEVICES, DTYPES, each_tensor

import pycoherence as pc
from pycoherence.ops.core.spec import tensors_of

CASES = [(op, dtype) for op, spec in pc.ops.specs.items() for dtype in spec.dtypes]
IDS = [f"{op}-{label}" for op, spec in pc.ops.specs.items() for label in DTYPES]


def few_samples(op: str, device: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """All outputs and one alone of the first sample, then an empty one; each check is slow."""
    samples = list(pc.ops.specs[op].samples(device, dtype))
    empty = (args for args in samples if any(x.numel() == 0 for x in tensors_of(args)))
    return [*samples[:2], *islice(empty, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "dtype"), CASES, ids=IDS)
def test_opcheck(op: str, dtype: torch.dtype, device: str) -> None:
    overload = getattr(torch.ops.pycoherence, op).default
    for args in few_samples(op, device, dtype):
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("op", pc.ops.specs)
def test_compiles_without_a_graph_break(op: str) -> None:
    torch._dynamo.reset()  # it counts compilations by code, which is one for all ops
    overload = getattr(torch.ops.pycoherence, op)
    compiled = torch.compile(lambda *args: overload(*args), fullgraph=True, backend="aot_eager")
    for args in few_samples(op, "cpu", torch.float32)[:2]:
        torch.testing.assert_close(compiled(*args), overload(*args), rtol=0, atol=0)


def test_the_function_of_an_op_compiles_without_a_warning() -> None:
    torch._dynamo.reset()  # it warns once
    x, g = torch.randn(3, 2, 4), torch.randn(3, 2, 5)

    def norms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor | None:
        return pc.ops.linear_reduce(x, g, want=("sq_norms",)).sq_norms

    compiled = torch.compile(norms, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, g), norms(x, g))


@pytest.mark.parametrize("op", pc.ops.specs)
def test_runs_on_meta_tensors(op: str) -> None:
    for args in few_samples(op, "cpu", torch.float32):
        meta = each_tensor(lambda x: x.to("meta"), args)
        real, fake = (getattr(torch.ops.pycoherence, op)(*a) for a in (args, meta))
        assert _kinds(real) == _kinds(fake)
        assert all(x.is_meta for x in tensors_of([fake]))


def _kinds(outputs: Any) -> list[Any]:
    listed = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return [x if x is None else (x.shape, x.dtype, x.stride()) for x in listed]
