"""The parts that every `*_order` op shares: checks, reference, fake kernel and samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.call import call
from pycoherence.ops.core.chunks import Chunks, row_slices
from pycoherence.ops.core.spec import OpSpec, accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.ops.family.rules import RULES, aggregate, check_rule

_TAIL = "str rule, float k, bool drop) -> Tensor"

# Bytes that a rule takes for each number: it is copied, sorted with indices of 8 bytes, and masked.
BYTES_BESIDE = 24


def order(op: str, *head: Any, rule: str, k: float, nonfinite: str) -> Tensor:
    """Run a `*_order` op as its public function does.

    Args:
        op: Name of the op.
        head: Its arguments before the rule.
        rule: Argument of the public function, like the others.
        k: Number of the rule.
        nonfinite: `"nan"` or `"drop"`.
    """
    if nonfinite not in ("nan", "drop"):
        raise ValueError(f"{op}: expected nonfinite to be 'nan' or 'drop', got {nonfinite!r}")
    return call(op, *head, rule, k, nonfinite == "drop")


def order_reference(
    rows: Callable[[slice], Chunks],
    g: Tensor,
    shape: Sequence[int],
    rule: str,
    k: float,
    drop: bool,
    *,
    unit: int = 1,
) -> Tensor:
    """Apply a rule to materialised gradients, some rows of the parameter at a time.

    Args:
        rows: From a slice of the parameter's first dimension, the gradients of that part.
        g: Tells batch size, dtype and device.
        shape: Shape of the parameter.
        rule: Name of the rule.
        k: Its number.
        drop: Whether an example is left out of coordinates in which it is not finite.
        unit: A slice has a multiple of this number of rows, or lies within one such multiple.

    Returns:
        See `order_fake`.
    """
    out = order_fake(g, shape).zero_()
    if not len(g) or not out.numel():
        return out
    size = len(g) * prod(shape[1:]) * (out.itemsize + BYTES_BESIDE)
    for part in row_slices(shape[0], unit, max(1, workspace() // size)):
        values = rows(part).joined().flatten(1)
        out[part] = aggregate(values, rule, k, drop).view(out[part].shape)
    return out


def order_fake(g: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised parameter of accumulation dtype."""
    return g.new_empty(tuple(shape), dtype=accumulate_dtype(g.dtype))


def _tails(batch: int) -> Iterator[tuple[str, float, bool]]:
    """Each rule with a `k` that fits the batch."""
    for i, (name, rule) in enumerate(RULES.items()):
        high = max(rule.fewest, rule.most(batch))
        yield name, float(min(high, 3)) if rule.whole else 0.25, i % 2 == 1


def order_spec(
    head: str,
    *,
    check: Callable[..., None],
    like: Callable[..., tuple[Tensor, Sequence[int]]],
    reference: Callable[..., Tensor],
    heads: Callable[[torch.device | str, torch.dtype], Iterable[tuple[Any, ...]]],
    supports: Mapping[str, Callable[..., str | None]] = MappingProxyType({}),
    helper: Callable[..., Any] | None = None,
) -> OpSpec:
    """The `OpSpec` of a `*_order` op.

    Its arguments are a head of its own and a tail that all share: `rule, k, drop`.

    Args:
        head: Schema of the head, `name(Tensor x, ...`, without the tail.
        check: Checks the head; takes the name of the op before it.
        like: From the head, a tensor (for batch size, dtype, device) and the shape of the
            parameter.
        reference: See `OpSpec`.
        heads: Samples of the head, from device and dtype.
        supports: See `OpSpec`.
        helper: See `OpSpec`.
    """
    name = head.partition("(")[0]

    def check_all(*args: Any) -> None:
        *first, rule, k, _ = args
        check(name, *first)
        check_rule(name, len(like(*first)[0]), rule, k)

    def fake(*args: Any) -> Tensor:
        return order_fake(*like(*args[:-3]))

    def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        for sample in heads(device, dtype):
            for tail in _tails(len(like(*sample)[0])):
                yield (*sample, *tail)

    schema = f"{head}, {_TAIL}"
    return OpSpec(schema, check_all, reference, fake, samples, supports, helper=helper)
