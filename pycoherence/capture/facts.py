"""The facts of each tensor of a forward pass: its parameters, and whose elements it holds.

An *owner* says which example each element belongs to. `Regular` serves nearly all tensors, costs
nothing and survives every view, since it speaks of the flattened order. `Ids` holds the example of
each element as a tensor, and serves whatever is sorted, gathered, routed or packed. `Lost` says
which function made it impossible to tell.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from pycoherence.capture.torch_internals import note_of

SHARED = -1
"""The id of an element in which no example has a part: padding, constants."""

MIXED = 1 << 40
"""The id of an element in which several examples have a part; larger than any example's."""


class Regular(NamedTuple):
    """Element i of the flattened tensor belongs to example `(i // stride) % count`."""

    stride: int
    count: int


class Ids:
    """The example of each element; two are equal if they are the same object.

    Attributes:
        ids: The id of each element; dimensions along which nothing varies have size 1.
        count: How many examples there are.
    """

    __slots__ = ("count", "ids")

    def __init__(self, ids: Tensor, count: int) -> None:
        self.ids, self.count = ids, count


class Lost(NamedTuple):
    """Whose elements they are is not known, or several examples have a part in each.

    Attributes:
        function: The function that lost it, as users write it.
        mixed: Whether examples are mixed; otherwise nobody has described the function.
        count: How many examples there are.
    """

    function: str
    mixed: bool
    count: int


Owner = Regular | Ids | Lost

CONSTANT, FOREIGN, PARAMETERS, EXAMPLES = 1, 2, 4, 8
"""Kinds of tensors, as bits, so that those of a call's arguments can be joined."""


class Facts:
    """The facts of one tensor.

    Attributes:
        kind: `CONSTANT` if it depends on no example and no tracked parameter, `FOREIGN` if it came
            from outside with another number of rows than the batch, `PARAMETERS` if it depends
            on tracked parameters and constants alone, `EXAMPLES` if examples have a part in it.
        owner: Whose elements it holds, if it is of examples.
        soft: Not zero if the owner is only a default, the first dimension: 1 of what comes from
            outside, 2 of what the block makes, which counts only until the batch is known.
        derived: How it was made, if it is of parameters.
    """

    __slots__ = ("derived", "kind", "owner", "soft")

    def __init__(self, kind: int, owner: Any = None, *, soft: int = 0, derived: Any = None) -> None:
        self.kind = kind
        self.owner = owner
        self.soft = soft
        self.derived = derived


IS_CONSTANT = Facts(CONSTANT)
IS_MADE = Facts(CONSTANT)
"""A constant that the block itself has made."""

IS_FOREIGN = Facts(FOREIGN)


class FactTable:
    """The facts of tensors, which it does not keep alive.

    Attributes:
        batch_first: Whether the first dimension has been the batch of all that examples own.
        entries: By the `id` of a tensor, a reference to it, its facts and its version then.
    """

    def __init__(self) -> None:
        self.batch_first = True
        self.entries: dict[int, tuple[Any, Facts, int]] = {}

    def get(self, x: Tensor) -> Facts | None:
        """The facts of a tensor, if there are any."""
        found = self.entries.get(id(x))
        # The id of a tensor that is gone may have been given to another one.
        return found[1] if found is not None and found[0]() is x else None

    def put(self, x: Tensor, facts: Facts) -> None:
        """Remember the facts of a tensor as it is now."""
        try:
            version = x._version  # as `version_of` does, without another call
        except RuntimeError:
            version = 0
        self.entries[id(x)] = ref(x), facts, version
        if type(x) is not Tensor and facts.kind == EXAMPLES and x.grad_fn is not None:
            note_of(x.grad_fn)[x.output_nr] = ref(self), facts, tuple(x.shape)
        if facts.kind == EXAMPLES and self.batch_first:
            owner = facts.owner
            if type(owner) is Regular:
                stride, count = owner
                first = count == 1 or stride * count == x.numel()
            else:
                first = type(owner) is Lost
            self.batch_first = first or not x.is_floating_point()

    def recall(self, node: Any, output: int) -> tuple[Facts, tuple[int, ...]] | None:
        """The facts and the shape of an output of a node, if it was no plain tensor.

        Hooks that distribute tensors let go of those that they are given.
        """
        found = note_of(node).get(output)
        return None if found is None or found[0]() is not self else found[1:]

    def is_stale(self, x: Tensor) -> bool:
        """Whether a tensor has been written into since its facts were put."""
        return self.entries[id(x)][2] != version_of(x)

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()
        self.batch_first = True

    def alive(self) -> Iterator[tuple[Tensor, Facts]]:
        """The tensors that are still alive, the newest first, and their facts."""
        for alive, facts, _ in reversed(list(self.entries.values())):
            if (x := alive()) is not None:
                yield x, facts

    def constants(self) -> Iterator[Tensor]:
        """The constants that the block has made and that are still alive."""
        for alive, facts, _ in self.entries.values():
            if facts is IS_MADE and (x := alive()) is not None:
                yield x


def version_of(x: Tensor) -> int:
    """How often a tensor has been written into."""
    try:
        return x._version
    except RuntimeError:
        return 0  # of an inference tensor, which does not count it and has no gradient


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    found: list[Tensor] = []
    _collect((value,), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


@lru_cache(maxsize=4096)
def along(shape: tuple[int, ...], owner: Regular) -> tuple[int, int] | None:
    """The only dimension along which an owner varies, and how many indices in a row are one's.

    Index j of dimension d then belongs to example `(j // inner) % count`. `None` if the owner
    varies along several dimensions, or along none.
    """
    stride, count = owner
    if 0 in shape:
        return next(((d, 1) for d, n in enumerate(shape) if n == count), None)
    if count == 1:
        return None
    step = 1
    for d in range(len(shape) - 1, -1, -1):
        above = step * shape[d]
        if stride % step == 0 and above % (stride * count) == 0:
            return d, stride // step
        step = above
    return None


def regular_at(shape: tuple[int, ...], d: int, inner: int, count: int) -> Regular:
    """The owner that varies along one dimension."""
    return Regular(max(1, inner * prod(shape[d + 1 :])), count)


def place_of(owners: Iterable[Owner | None], places: Iterable[Tensor] = ()) -> torch.device:
    """The device to make ids on: the host, so that nothing waits for a GPU.

    The exception is ids, or places that a function is told, that lie on a GPU already; it takes
    those of the host beside them.
    """
    known = [owner.ids for owner in owners if isinstance(owner, Ids)]
    devices = (x.device for x in (*known, *places))
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def is_place(x: Tensor) -> bool:
    """Whether the numbers of a tensor may say where elements are."""
    return not (x.is_floating_point() or x.is_complex())


def ids_of(owner: Owner, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The example of each element, with size 1 along what does not vary."""
    if isinstance(owner, Ids):
        return owner.ids.to(device)
    ones = [1] * len(shape)
    if isinstance(owner, Lost):
        return torch.full(ones, MIXED, device=device)
    stride, count = owner
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.int64, device=device)
    if count == 1:
        return torch.zeros(ones, dtype=torch.int64, device=device)
    place = along(shape, owner)
    if place is None:
        return (torch.arange(prod(shape), device=device) // stride % count).view(shape)
    d, inner = place
    ones[d] = shape[d]
    return (torch.arange(shape[d], device=device) // inner % count).view(ones)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Ids of what both have a part in: elements of no example agree with everything."""
    return torch.where(a == SHARED, b, torch.where((b == SHARED) | (a == b), a, MIXED))


def join_along(ids: Tensor, dims: list[int]) -> Tensor:
    """Ids of what all elements along some dimensions have a part in, which become 1."""
    dims = [d for d in dims if ids.shape[d] != 1]
    if not dims:
        return ids
    if ids.numel() == 0:
        shape = [1 if d in dims else n for d, n in enumerate(ids.shape)]
        return torch.full(shape, SHARED, dtype=ids.dtype, device=ids.device)
    high = ids.amax(dims, keepdim=True)
    low = ids.masked_fill(ids == SHARED, MIXED).amin(dims, keepdim=True)
    return torch.where((high == low) | (high == SHARED), high, MIXED)


def recognise(ids: Tensor, shape: tuple[int, ...], count: int, function: str) -> Owner | None:
    """The simplest owner that says the same as ids; `None` if no example has a part.

    Elements of no example, such as zeros that were put behind the words of a sentence, take the
    owner of what they stand beside, if all indices of one dimension have a single owner each.
    Otherwise they stay nobody's, and no gradient may arrive at them.
    """
    if 0 in shape:
        return Regular(1, count)
    device, ids = ids.device, ids.cpu()  # one transfer, and then no more waiting
    shared = ids == SHARED
    if bool(shared.all()):
        return None
    if bool((ids[~shared] == MIXED).all()):
        return Lost(function, mixed=True, count=count)
    if count == 1:
        return Regular(1, 1)
    if bool(shared.any()):
        continued = _continued(ids.expand(shape), shape, count)
        if isinstance(continued, Regular):
            return continued
        ids = ids if continued is None else ids_of(continued, shape, ids.device)
        return Ids(_squeezed(ids).to(device), count)
    ids = _squeezed(ids)
    varying = [d for d in range(ids.dim()) if ids.shape[d] > 1]
    if len(varying) == 1:
        inner = period(ids.flatten(), count)
        if inner is not None:
            return regular_at(shape, varying[0], inner, count)
    elif varying:
        stride = period(ids.expand(shape).flatten(), count)
        if stride is not None:
            return Regular(stride, count)
    return Ids(ids.to(device), count)


def _squeezed(ids: Tensor) -> Tensor:
    """The same ids, of size 1 along dimensions in which nothing varies."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1:
            first = ids.narrow(d, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


def _continued(ids: Tensor, shape: tuple[int, ...], count: int) -> Owner | None:
    """The only owner along one dimension that known ids follow, with every example in it.

    Nothing is concluded if an index of that dimension has no known element, since rows may lie in
    any order, or if an example is missing, since any dimension then looks like the batch.
    """
    found: list[Owner] = []
    for d, n in enumerate(ids.shape):
        if n == 1:
            continue
        each = join_along(ids, [e for e in range(ids.dim()) if e != d])
        if bool(((each == SHARED) | (each == MIXED)).any()) or len(each.unique()) < count:
            continue
        inner = period(each.flatten(), count)
        found.append(Ids(each, count) if inner is None else regular_at(shape, d, inner, count))
    return found[0] if len(found) == 1 else None


def period(ids: Tensor, count: int) -> int | None:
    """The stride, if ids on the host are `(i // stride) % count`."""
    n = len(ids)
    if not count:
        return None if n else 1
    if n % count:
        return None
    place = torch.arange(n)
    for stride in _divisors(n // count):
        if bool((place // stride % count == ids).all()):
            return stride
    return None


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
