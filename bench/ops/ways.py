"""The parts of the files in `plain/`: ways to compute an op in plain torch.

`plain/<op>.py` holds, for the op of its name:

    SHAPES, QUICK   shapes to measure, as dicts; those of `--quick`
    inputs          from a shape, a source of random tensors: the op's arguments, by name
    WAYS            formulations in plain torch, by name

The arguments that all `*_reduce` ops share (`coef`, `direction`, `want`) are added by `cases.py`,
and so are those of the `*_order` ops (`rule`, `k`, `drop`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.core.spec import OpSpec

Shape = Mapping[str, Any]
Outputs = dict[str, Tensor]


class Way(NamedTuple):
    """One formulation.

    Attributes:
        run: `run(wanted, **arguments)` gives the wanted outputs, by name.
        workspace: The same arguments, to the bytes it needs beside inputs and outputs, or `None`
            if it does not compute what is wanted.
    """

    run: Callable[..., Outputs]
    workspace: Callable[..., float | None]


class Source:
    """Seeded random tensors on a device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def statistic(self, *shape: int) -> Tensor:
        """Normal numbers in the dtype in which statistics are summed."""
        return torch.randn(shape, generator=self._generator).to(self.device, self.accumulate)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)


def argument_names(spec: OpSpec) -> list[str]:
    """Names of the arguments, in order."""
    op = getattr(torch.ops.pycoherence, spec.name).default
    return [argument.name for argument in op._schema.arguments]


def reference(op: str) -> Way:
    """The reference of an op that gives one output, for what no formulation here beats."""

    def run(wanted: frozenset[str], **arguments: Any) -> Outputs:
        spec = pc.ops.specs[op]
        found = spec.reference(*(arguments[name] for name in argument_names(spec)))
        return dict.fromkeys(wanted, found)

    return Way(run, lambda wanted, **arguments: float(pc.workspace()))


def widen(x: Tensor) -> Tensor:
    """Half precision to float32, in which statistics are summed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shapes(names: str, *rows: Sequence[Any]) -> tuple[Shape, ...]:
    """Shapes from a table."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


def reduce_rows(
    wanted: frozenset[str], rows: Tensor, coef: Tensor | None, direction: Tensor | None
) -> Outputs:
    """The outputs of a `*_reduce` op, from materialised gradients `[B, *parameter]`."""
    flat, parameter, out = rows.flatten(1), rows.shape[1:], Outputs()
    if "sq_norms" in wanted:
        out["sq_norms"] = sq_norms(flat)
    if "dots" in wanted and direction is not None:
        out["dots"] = gram(flat, direction.view(1, -1))[:, 0]
    if "gram" in wanted:
        out["gram"] = gram(flat, flat)
    if wanted & {"weighted_sum", "sum_dots"}:
        total = flat.sum(0) if coef is None else coef @ flat
        out["weighted_sum"] = total.view(parameter)
        if "sum_dots" in wanted:
            out["sum_dots"] = gram(flat, total.view(1, -1))[:, 0]
    if "second_moment" in wanted:
        out["second_moment"] = flat.square().sum(0).view(parameter)
    if "sign_sum" in wanted:
        out["sign_sum"] = flat.sign().sum(0).view(parameter)
    return out


def sq_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row, `[B]`."""
    # In float32 the norm of a long row loses digits (1e-3 at 2^24 numbers), so that pieces are
    # taken; squaring and summing is exact enough, but takes several times as long.
    piece = math.gcd(rows.shape[1], 4096)
    if piece < 64:
        return torch.linalg.vector_norm(rows, dim=1).square()
    return torch.linalg.vector_norm(rows.unflatten(1, (-1, piece)), dim=2).square().sum(1)


def gram(rows: Tensor, other: Tensor) -> Tensor:
    """Dot products of all rows of one matrix with all of another."""
    # In float32 one long product loses digits as well (1e-4 at 2^24 numbers).
    piece = math.gcd(rows.shape[1], 2**15)
    if piece < 1024:
        return rows @ other.T
    left, right = (x.unflatten(1, (-1, piece)).transpose(0, 1) for x in (rows, other))
    return torch.bmm(left, right.mT).sum(0)


def rows_workspace(wanted: frozenset[str], batch: int, parameter: int) -> float:
    """Bytes for gradients in float32, and for the copy of them that some outputs take."""
    copies = 1 + bool(wanted & {"second_moment", "sign_sum"})
    return 4.0 * batch * parameter * copies


def reduce_one_by_one(
    wanted: frozenset[str],
    gradient: Callable[[int], Tensor],
    batch: int,
    coef: Tensor | None,
    direction: Tensor | None,
) -> Outputs:
    """A loop over the examples, in which one gradient at a time is in memory."""
    out, examples = Outputs(), []
    for b in range(batch):
        one = gradient(b)
        found = reduce_rows(wanted, one[None], None if coef is None else coef[b : b + 1], direction)
        examples.append(found)
        for name in ("weighted_sum", "second_moment", "sign_sum"):
            if name in found:
                out[name] = out[name].add_(found[name]) if name in out else found[name]
    for name in wanted & {"sq_norms", "dots"}:
        out[name] = torch.cat([found[name] for found in examples])
    return out


ONE_BY_ONE = frozenset({"sq_norms", "dots", "weighted_sum", "second_moment", "sign_sum"})
"""Outputs that `reduce_one_by_one` can give."""
