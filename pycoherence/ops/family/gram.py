"""The parts that every `*_gram` op shares: checks, reference and fake kernel."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pycoherence.ops.core.chunks import Chunks, mirrored
from pycoherence.ops.core.spec import OpSpec, accumulate_dtype
from pycoherence.ops.family.reduce import check_factors


def gram_reference(one: Chunks, two: Chunks, like: Tensor) -> Tensor:
    """All dot products of materialised gradients, chunk by chunk of both batches.

    Args:
        one: Gradients of the first batch, which give the rows.
        two: Gradients of the second batch.
        like: A tensor of the right shape, dtype and device.
    """
    out = torch.zeros_like(like)
    for part in one.parts:
        for other in two.parts:
            out[part, other] = one.products(part, two, other)
    return out


def gram_fake(one: Tensor, two: Tensor | None) -> Tensor:
    """An uninitialised `[B1, B2]` of accumulation dtype."""
    columns = one if two is None else two
    dtype = accumulate_dtype(one.dtype)
    return one.new_empty((one.shape[0], columns.shape[0]), dtype=dtype)


def gram_spec(
    name: str,
    factor: str,
    options: str,
    *,
    check: Callable[..., None],
    shape: Callable[..., Sequence[int]],
    materialise: Callable[..., tuple[Chunks, Chunks]],
    pairs: Callable[[torch.device | str, torch.dtype], Iterable[tuple[Any, ...]]],
    supports: Mapping[str, Callable[..., str | None]] = MappingProxyType({}),
) -> OpSpec:
    """The `OpSpec` of the Gram matrix of one or two batches of factors.

    Its arguments are the factors of both batches, those of the second `None` for a batch with
    itself, and then options.

    Args:
        name: Name of the op.
        factor: Name of the factor beside `g`, without the number of the batch.
        options: Schema of the options, with a leading comma, or nothing.
        check: Checks one batch: what to call it, its two factors, the options.
        shape: Shape of a gradient, from the two factors and the options.
        materialise: Gradients of both batches, from all arguments, none of them `None`.
        pairs: Samples of all arguments, from device and dtype.
        supports: See `OpSpec`.
    """

    def check_both(
        a1: Tensor, g1: Tensor, a2: Tensor | None, g2: Tensor | None, *options: Any
    ) -> None:
        check(name, a1, g1, *options)
        if (a2 is None) != (g2 is None):
            raise ValueError(
                f"{name}: expected {factor}2 and g2 together, got one of them; give both, or "
                "neither for a batch with itself"
            )
        if a2 is None or g2 is None:
            return
        check(f"{name}, second batch", a2, g2, *options)
        check_factors(name, g1=g1, g2=g2)
        shapes = [tuple(shape(*pair, *options)) for pair in ((a1, g1), (a2, g2))]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}: expected both batches to have gradients of one shape, got {shapes[0]} "
                f"and {shapes[1]}"
            )

    def reference(
        a1: Tensor, g1: Tensor, a2: Tensor | None, g2: Tensor | None, *options: Any
    ) -> Tensor:
        second = (a1, g1) if a2 is None else (a2, g2)
        found = gram_reference(*materialise(a1, g1, *second, *options), gram_fake(g1, g2))
        return mirrored(found) if a2 is None else found

    def fake(a1: Tensor, g1: Tensor, a2: Tensor | None, g2: Tensor | None, *options: Any) -> Tensor:
        return gram_fake(g1, g2)

    def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
        for a1, g1, a2, g2, *rest in pairs(device, dtype):
            yield a1, g1, None, None, *rest
            yield a1, g1, a2, g2, *rest

    schema = (
        f"{name}(Tensor {factor}1, Tensor g1, Tensor? {factor}2, Tensor? g2{options}) -> Tensor"
    )
    return OpSpec(schema, check_both, reference, fake, samples, supports)
