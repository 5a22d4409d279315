"""Reductions over lookups of a table on the emulated GPU agree with the reference in float64."""

from types import ModuleType
from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_reduced_close
from support.looked_up import DTYPES, array, sample
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced
from pycoherence.ops.core.outputs import mask, unpack
from pycoherence.ops.core.spec import accumulate_dtype

ALL = tuple(name for name in Reduced._fields if name != "gram")


def reduce(
    emulation: ModuleType,
    ids: Tensor,
    g: Tensor,
    rows: int,
    padding: int = -1,
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    want: tuple[str, ...] = ALL,
) -> Reduced:
    """As the binding of the op calls the launcher."""
    acc, batch = accumulate_dtype(g.dtype), len(g)
    sizes = dict.fromkeys(ALL, (rows, g.shape[2])) | dict.fromkeys(
        ("sq_norms", "dots", "sum_dots"), (batch,)
    )
    out = {name: torch.zeros(sizes[name], dtype=acc) for name in ALL if name in want}
    meet = set(want) - {"sq_norms", "dots"}
    flat, places = ids.flatten(), None
    if meet or (ids.shape[1] > 1 and "sq_norms" in want):
        flat, places = torch.sort(flat, stable=True)
    emulation.embedding_reduce(
        array(flat),
        None if places is None else array(places),
        array(g),
        rows,
        padding,
        None if coef is None else array(coef.to(acc)),
        None if direction is None else array(direction.to(acc)),
        [array(out[name]) if name in out else None for name in ALL],
    )
    return Reduced(**out)


def check(emulation: ModuleType, *args: Any, want: tuple[str, ...] = ALL) -> None:
    ids, g, rows, padding, coef, direction = args
    wide = [x if x is None else x.double() for x in (coef, direction)]
    outputs = pc.ops.specs["embedding_reduce"].reference(
        ids, g.double(), rows, padding, *wide, mask(want)
    )
    truth = unpack(outputs)
    found = reduce(emulation, *args, want)
    assert_reduced_close(found, truth, TOLERANCE[g.dtype])


# The widths reach one column of a lane and several, in one tile and several.
SIZES = [
    (3, 5, 4, 1, -1),
    (2, 7, 3, 33, 1),
    (3, 2, 40, 130, -1),
    (3, 4, 3, 132, 2),
    (5, 1, 3, 68, 0),
    (1, 1, 1, 5, -1),
    (3, 40, 1000, 5, 999),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reduce(emulation, size, dtype):
    *shape, padding = size
    ids, g, coef, direction = sample(*shape, dtype)
    rows = size[2]
    check(emulation, ids, g, rows, padding, coef, direction)
    check(emulation, ids, g, rows, padding, None, None, want=("sq_norms",))


@pytest.mark.parametrize("want", ALL)
def test_each_alone(emulation, want):
    ids, g, _, direction = sample(3, 5, 4, 6, torch.float32)
    direction = direction if want == "dots" else None
    check(emulation, ids, g, 4, 2, None, direction, want=(want,))


# One segment of a long run, segments of several lengths in one, and runs that end beside it.
LONG = [(1, 150, 1), (2, 100, 1), (40, 2, 1), (75, 1, 1), (16, 17, 3), (64, 1, 1), (65, 1, 1)]


@pytest.mark.parametrize("size", LONG, ids=str)
def test_long_runs(emulation, size):
    ids, g, coef, direction = sample(*size, 3, torch.float32)
    check(emulation, ids, g, size[2], -1, coef, direction)
    check(emulation, ids, g, size[2], 0, coef, direction)


def test_blocks_in_any_order(ordered):
    ids, g, coef, direction = sample(10, 17, 2, 35, torch.float32)
    check(ordered, ids, g, 2, -1, coef, direction)


@pytest.mark.parametrize("shape", [(1, 3000), (300, 1), (20, 100)])
def test_long_sums_do_not_drift(emulation, shape):
    ids, g = torch.zeros(shape, dtype=torch.int64), torch.full((*shape, 1), 0.1)
    check(emulation, ids, g, 1, -1, None, None, want=("sq_norms", "weighted_sum", "second_moment"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [(4, 6, 3), (30, 7, 2)], ids=str)
def test_what_is_not_finite_stays_in_its_example(emulation, size, bad):
    """All look up all rows: for the reference, no row is apart from an example."""
    ids, g, coef, direction = sample(*size, 5, torch.float32)
    ids[:, : size[2]] = torch.arange(size[2])
    g[1, 2] = bad
    check(emulation, ids, g, size[2], -1, coef, direction)
    coef[1] = 0
    check(emulation, ids, g, size[2], -1, coef, direction)
    found = reduce(emulation, ids, g, size[2], -1, coef, want=("weighted_sum", "sum_dots"))
    assert found.weighted_sum is not None
    assert found.weighted_sum.isfinite().all()
    assert found.sum_dots is not None
    assert found.sum_dots.isfinite().sum() == len(g) - 1


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
@pytest.mark.parametrize("want", ["sq_norms", "weighted_sum"])
def test_ids_out_of_range_are_an_error(emulation, want, bad):
    ids, g, *_ = sample(3, 5, 4, 6, torch.float32)
    ids[1, 2] = bad
    with pytest.raises(RuntimeError, match="embedding_reduce: an id is out of range"):
        reduce(emulation, ids, g, 4, want=(want,))


def test_ids_of_a_table_that_fits_nowhere(emulation):
    ids, g = torch.tensor([[5, 2**40 - 1], [5, 5]]), torch.ones(2, 2, 4)
    found = reduce(emulation, ids, g, 2**40, want=("sq_norms", "sum_dots"))
    assert found.sum_dots is not None
    assert found.sum_dots.tolist() == [4 * (3 + 1), 4 * 2 * 3]
