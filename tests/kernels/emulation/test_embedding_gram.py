"""Grams of lookups of a table on the emulated GPU agree with the reference in float64."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import TOLERANCE, assert_close
from support.looked_up import DTYPES, array, sample
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.core.spec import accumulate_dtype


def gram(
    emulation: ModuleType,
    one: tuple[Tensor, Tensor],
    two: tuple[Tensor, Tensor] | None = None,
    padding: int = -1,
    rows: int = 2**62,
    workspace: int = 2**20,
) -> Tensor:
    """As the binding of the op calls the launchers."""

    def batch(ids: Tensor, g: Tensor) -> tuple[np.ndarray, ...]:
        ids, places = torch.sort(ids, dim=1, stable=True)
        return array(ids), array(places), array(g)

    out = torch.full(
        (len(one[0]), len((two or one)[0])), torch.nan, dtype=accumulate_dtype(one[1].dtype)
    )
    second = None if two is None else batch(*two)
    emulation.embedding_gram(*batch(*one), second, rows, padding, workspace, array(out))
    return out


def check_gram(emulation: ModuleType, *batches: tuple[Tensor, Tensor], **options: Any) -> None:
    args = [None] * 4
    for i, (ids, g) in enumerate(batches):
        args[2 * i : 2 * i + 2] = ids, g.double()
    truth = pc.ops.specs["embedding_gram"].reference(*args, options.get("padding", -1))
    found = gram(emulation, *batches, **options)
    assert_close(found, truth, TOLERANCE[batches[0][1].dtype])
    if len(batches) == 1:
        assert torch.equal(found.nan_to_num(), found.mT.nan_to_num())


GRAMS = [
    ((3, 5), (2, 7), 4, 1, -1),
    ((2, 70), (3, 2), 30, 33, 1),
    ((3, 2), (1, 300), 40, 68, -1),
    ((5, 1), (2, 1), 3, 132, 0),
    ((1, 1), (1, 1), 1, 5, -1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GRAMS, ids=str)
def test_gram(emulation, size, dtype):
    *shapes, rows, width, padding = size
    one, two = (sample(*shape, rows, width, dtype)[:2] for shape in shapes)
    check_gram(emulation, one, padding=padding)
    check_gram(emulation, one, two, padding=padding)


@pytest.mark.parametrize("width", [70, 72])
def test_gram_of_some_columns_at_a_time(ordered, width):
    one, two = (sample(b, 5, 4, width, torch.float32)[:2] for b in (3, 2))
    check_gram(ordered, one, workspace=1)
    check_gram(ordered, one, two, workspace=1)


def test_gram_of_ids_of_any_size_and_of_none_in_common(emulation):
    ids, g, *_ = sample(3, 9, 5, 3, torch.float32)
    check_gram(emulation, (2**61 + ids, g))
    check_gram(emulation, (ids, g), (ids + 5, g))


def test_gram_of_one_id(emulation):
    check_gram(emulation, (torch.zeros(2, 150, dtype=torch.int64), torch.full((2, 150, 3), 0.1)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_pairs(emulation, bad):
    """All look up all rows, as the reference takes rows that an example does not for zeros."""
    ids, g, *_ = sample(4, 6, 3, 5, torch.float32)
    ids[:, :3] = torch.arange(3)
    g[1, 2] = bad
    check_gram(emulation, (ids, g))
    check_gram(emulation, (ids, g), (ids[:2], g[2:]))


@pytest.mark.parametrize(("bad", "rows"), [(-1, 2**62), (4, 4)])
def test_gram_of_ids_out_of_range_is_an_error(emulation, bad, rows):
    ids, g, *_ = sample(3, 5, 4, 6, torch.float32)
    ids[1, 2] = bad
    with pytest.raises(RuntimeError, match="embedding_gram: an id is out of range"):
        gram(emulation, (ids, g), rows=rows)
