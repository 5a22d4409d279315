"""Each op on its samples, on every backend that is here, against its reference in float64."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pycoherence.ops import BACKENDS, backend, specs
from pycoherence.ops.core.dispatch import explain
from pycoherence.ops.core.spec import OpSpec, Outputs

TOLERANCE = {torch.float64: 1e-12}
"""Allowed error over the largest value; 1e-5 for the dtypes that are accumulated in float32."""


def run(ops: Sequence[str] = ()) -> bool:
    """Print a line for each op, device and backend; returns whether all agree.

    Args:
        ops: The names of the ops to check; all if there are none.

    Raises:
        ValueError: There is no such op.
    """
    unknown = [name for name in ops if name not in specs]
    if unknown:
        raise ValueError(f"expected ops out of {', '.join(specs)}, got {', '.join(unknown)}")
    start, passed = time.monotonic(), True
    for spec in [specs[name] for name in ops] or specs.values():
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            for name in BACKENDS:
                passed &= _check_backend(spec, device, name)
    checked = "these" if ops else "all"
    outcome = f"{checked} ops agree with their references" if passed else "FAILED"
    print(f"{outcome} ({time.monotonic() - start:.1f} s)")
    return passed


def _check_backend(spec: OpSpec, device: str, name: str) -> bool:
    ran, worst, failures = 0, 0.0, list[str]()
    for dtype in spec.dtypes:
        for args in spec.samples(device, dtype):
            if explain(spec, device, args)[name] is not None:
                continue
            error = _error(spec, args, name)
            ran, worst = ran + 1, max(worst, error)
            if error > TOLERANCE.get(dtype, 1e-5):
                failures.append(f"  {dtype}, {_shapes(args)}: error {error:.1e}")
    if ran:
        verdict = "FAILED" if failures else "ok"
        print(f"{spec.name:<18} {device:<5} {name:<10} {ran:>4} samples  {worst:.0e}  {verdict}")
        print("\n".join(failures), end="\n" if failures else "")
    return not failures


def _error(spec: OpSpec, args: tuple[Any, ...], name: str) -> float:
    """Largest error over the largest value, the worst of the outputs."""
    with backend(name):
        got = getattr(torch.ops.pycoherence, spec.name)(*args)
    true = spec.reference(*tree_map_only(Tensor, _widen, args))
    pairs = zip(_tuple(got), _tuple(true), strict=True)
    return max(_output_error(ours, truth) for ours, truth in pairs)


def _output_error(ours: Tensor | None, truth: Tensor | None) -> float:
    if ours is None or truth is None:
        return 0.0 if ours is truth else math.inf
    if ours.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    error = (ours.double() - truth.double()).abs().max().item()
    scale = truth.double().abs().max().item()
    if not math.isfinite(error) or (error > 0 and scale == 0):
        return math.inf
    return error / scale if error else 0.0


def _widen(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _tuple(outputs: Outputs) -> tuple[Tensor | None, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _shapes(args: tuple[Any, ...]) -> str:
    shapes = tree_map_only(Tensor, lambda x: tuple(x.shape), args)
    return ", ".join(map(str, shapes))
