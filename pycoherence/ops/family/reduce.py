"""The parts that every `*_reduce` op shares: checks, reference, fake kernel and samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks, mirrored
from pycoherence.ops.core.outputs import (
    Reduced,
    empty_outputs,
    mask,
    mask_of,
    names_of,
    unpack,
    zero_outputs,
)
from pycoherence.ops.core.spec import FLOAT_DTYPES, OpSpec, accumulate_dtype

_TAIL = (
    "Tensor? coef, Tensor? direction, int want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def check_factors(op: str, **tensors: Tensor) -> None:
    """Factors must be floating, of one dtype and on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: expected {name} to be float16, bfloat16, float32 or float64, "
                f"got {tensor.dtype}"
            )
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise TypeError(
                f"{op}: expected {name} to have the dtype and device of {first_name} "
                f"({first.dtype}, {first.device}), got {tensor.dtype} on {tensor.device}"
            )


def check_tail(
    op: str,
    g: Tensor,
    shape: Sequence[int],
    coef: Tensor | None,
    direction: Tensor | None,
    want: int,
) -> None:
    """Check `coef`, `direction` and `want` for a parameter of `shape` and the batch of `g`."""
    bits = len(Reduced._fields)
    if not 0 < want < 1 << bits:
        raise ValueError(f"{op}: expected want to be a mask of {bits} bits, got {want}")
    wanted = names_of(want)
    if direction is None and "dots" in wanted:
        raise ValueError(f"{op}: 'dots' is wanted but no direction was given")
    for value, name, outputs, expected in (
        (coef, "coef", ("weighted_sum", "sum_dots"), (g.shape[0],)),
        (direction, "direction", ("dots",), tuple(shape)),
    ):
        if value is None:
            continue
        if wanted.isdisjoint(outputs):
            raise ValueError(
                f"{op}: {name} was given but {outputs[0]!r} is not wanted; add it to want"
            )
        if tuple(value.shape) != expected:
            raise ValueError(f"{op}: expected {name} of shape {expected}, got {tuple(value.shape)}")
        if not value.is_floating_point() or value.device != g.device:
            raise TypeError(
                f"{op}: expected {name} to be floating on {g.device}, "
                f"got {value.dtype} on {value.device}"
            )


def reduce_reference(
    chunks: Chunks,
    g: Tensor,
    shape: Sequence[int],
    coef: Tensor | None,
    direction: Tensor | None,
    want: int,
) -> tuple[Tensor | None, ...]:
    """Reduce materialised gradients, chunk by chunk of the batch.

    Args:
        chunks: The gradients.
        g: Output gradient; tells batch size, dtype and device.
        shape: Shape of the parameter.
        coef: `[B]` or `None`.
        direction: Parameter-shaped or `None`.
        want: Mask of wanted outputs.

    Returns:
        The outputs in the order of `Reduced`; `None` where not wanted.
    """
    gradients, parts = chunks.gradients, chunks.parts
    outputs = zero_outputs(g, shape, names_of(want))
    out = unpack(outputs)
    total = torch.zeros((), dtype=accumulate_dtype(g.dtype), device=g.device).expand(*shape)
    for part in parts:
        rows = gradients(part)
        flat = rows.flatten(1)
        if out.weighted_sum is not None or out.sum_dots is not None:
            kept = flat if coef is None else _scale(flat, coef[part])
            total = total + kept.sum(0).view(total.shape)
        if out.sq_norms is not None:
            out.sq_norms[part] = flat.square().sum(1)
        if out.dots is not None and direction is not None:
            out.dots[part] = chunks.dots_with(direction, part)
        if out.second_moment is not None:
            out.second_moment.add_(rows.square().sum(0))
        if out.sign_sum is not None:
            out.sign_sum.add_(torch.where(rows.isnan(), rows, rows.sign()).sum(0))
        if out.gram is not None:
            for other in parts:
                out.gram[part, other] = chunks.products(part, chunks, other)
    if out.gram is not None:
        out.gram.copy_(mirrored(out.gram))
    if out.weighted_sum is not None:
        out.weighted_sum.copy_(total)
    if out.sum_dots is not None:
        for part in parts:
            out.sum_dots[part] = chunks.dots_with(total, part)
    return outputs


def _scale(rows: Tensor, coef: Tensor) -> Tensor:
    coef = coef.to(rows.dtype).unsqueeze(1)
    return torch.where(coef == 0, torch.zeros_like(rows), coef * rows)


def _tails(
    batch: int, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """Sample tails: everything at once, then each output alone."""
    everything = mask(Reduced._fields)
    acc = accumulate_dtype(dtype)
    coef = randn(batch, device=device, dtype=acc, seed=10)
    direction = randn(*shape, device=device, dtype=acc, seed=11)
    yield coef, direction, everything
    for name in Reduced._fields:
        yield None, direction if name == "dots" else None, mask_of((name,))


def reduce_spec(
    head: str,
    *,
    check: Callable[..., None],
    like: Callable[..., tuple[Tensor, Sequence[int]]],
    reference: Callable[..., tuple[Tensor | None, ...]],
    heads: Callable[[torch.device | str, torch.dtype], Iterable[tuple[Any, ...]]],
    supports: Mapping[str, Callable[..., str | None]] = MappingProxyType({}),
) -> OpSpec:
    """The `OpSpec` of a `*_reduce` op.

    Its arguments are a head of its own and a tail that all share: `coef, direction, want`.

    Args:
        head: Schema of the head, `name(Tensor x, ...`, without the tail.
        check: Checks the head; takes the name of the op before it.
        like: From the head, the output gradient (for batch size, dtype, device) and the shape of
            the parameter.
        reference: See `OpSpec`.
        heads: Samples of the head, from device and dtype.
        supports: See `OpSpec`.
    """
    name = head.partition("(")[0]

    def check_all(*args: Any) -> None:
        check(name, *args[:-3])
        check_tail(name, *like(*args[:-3]), *args[-3:])

    def fake(*args: Any) -> tuple[Tensor | None, ...]:
        return empty_outputs(*like(*args[:-3]), names_of(args[-1]))

    def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        for sample in heads(device, dtype):
            g, shape = like(*sample)
            for tail in _tails(g.shape[0], shape, device, dtype):
                yield (*sample, *tail)

    schema = f"{head}, {_TAIL}"
    return OpSpec(schema, check_all, reference, fake, samples, supports)


def randn(*shape: int, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Seeded normal numbers that are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
