"""Sets of examples that are closest together, found on the host."""

from collections.abc import Iterator
from itertools import combinations, islice

import torch
from torch import Tensor

_AT_ONCE = 2**20
"""Numbers of the matrices whose eigenvalues are taken in one call."""


def least_diameter(sq_distances: Tensor, size: int) -> list[int]:
    """The `size` points whose largest distance from each other is least; the first such in order.

    The diameter is one of the distances, found by halving. Whether a set of that diameter exists
    is decided by leaving out one of two points that are too far apart, or the other, which asks
    for at most `2^(n - size)` steps.

    Args:
        sq_distances: `[n, n]`, on the host.
        size: From 1 to `n`.
    """
    tried = sq_distances.unique()
    low, high = 0, len(tried) - 1
    found = list(range(size))
    while low <= high:
        middle = (low + high) // 2
        nearer = _first_within(sq_distances <= tried[middle], size)
        if nearer is None:
            low = middle + 1
        else:
            found, high = nearer, middle - 1
    return found


def _first_within(near: Tensor, size: int) -> list[int] | None:
    """The first `size` points in order that are all near each other."""
    n = len(near)
    far = [sum(1 << j for j in range(n) if not row[j]) for row in near.tolist()]
    found = _search(far, (1 << n) - 1, [], n - size)
    return None if found is None else found[:size]


def _search(far: list[int], left: int, chosen: list[int], spare: int) -> list[int] | None:
    """Go on with the points of the bits `left`, of which `spare` may be left out."""
    if _pairs(far, left) > spare:
        return None
    while left:
        point = (left & -left).bit_length() - 1
        left &= left - 1
        conflicts = far[point] & left
        if not conflicts:
            chosen = [*chosen, point]
            continue
        cost = conflicts.bit_count()
        if cost <= spare:
            found = _search(far, left & ~conflicts, [*chosen, point], spare - cost)
            if found is not None:
                return found
        if not spare:
            return None
        spare -= 1
    return chosen


def _pairs(far: list[int], left: int) -> int:
    """A number of pairs that are too far apart and have no point in common; one of each must go."""
    count = 0
    while left:
        point = (left & -left).bit_length() - 1
        left &= left - 1
        conflicts = far[point] & left
        if conflicts:
            count += 1
            left &= ~(conflicts & -conflicts)
    return count


def least_spread(gram: Tensor, size: int) -> list[int]:
    """The `size` points whose covariance has the smallest largest eigenvalue; the first in order.

    Args:
        gram: Dot products, `[n, n]`, float64, on the host.
        size: From 1 to `n`.
    """
    best, least = list(range(size)), torch.inf
    for sets in _in_parts(combinations(range(len(gram)), size), max(1, _AT_ONCE // size**2)):
        products = gram[sets[:, :, None], sets[:, None, :]]
        centred = products - products.mean(1, keepdim=True)
        centred = centred - centred.mean(2, keepdim=True)
        largest = torch.linalg.eigvalsh(centred)[:, -1]
        value, i = largest.min(0)
        if value < least:
            best, least = sets[i].tolist(), value
    return best


def _in_parts(sets: Iterator[tuple[int, ...]], at_once: int) -> Iterator[Tensor]:
    while part := list(islice(sets, at_once)):
        yield torch.tensor(part)
