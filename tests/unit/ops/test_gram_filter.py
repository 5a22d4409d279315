"""gram_filter against the points themselves, on every backend."""

from typing import Any

import pytest
import torch
from support import plain_rules as plain
from support.backends import on_each_place
from support.raising import raising

import pycoherence as pc

everywhere = on_each_place("gram_filter")


@everywhere
@pytest.mark.parametrize("threshold", [0.123, 0.777, 1.1, 1.83])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 130])
def test_is_the_points_own(backend: str, n: int, threshold: float) -> None:
    torch.manual_seed(n)
    rows, kept = torch.randint(-3, 4, (n, 3)).double(), torch.arange(n) % 4 != 2
    for counted in (torch.ones_like(kept), kept):
        gram = (rows @ rows.mT).masked_fill(~(counted & counted[:, None]), torch.nan)
        weights, taken = pc.ops.gram_filter(gram, counted, threshold)
        expected = plain.gaf(rows[counted], threshold)
        assert (weights @ rows - expected).norm() <= 1e-12 * (1 + rows.norm(dim=1).max())
        assert torch.equal(taken > 0, weights > 0)
        assert abs(weights.sum() - taken.any().double()) <= 1e-15
        assert not taken[~counted].any()


@everywhere
def test_nothing_is_kept(backend: str) -> None:
    for n in (0, 3):
        kept = torch.zeros(n, dtype=torch.bool)
        for out in pc.ops.gram_filter(torch.ones(n, n), kept, 1.0):
            assert out.tolist() == [0.0] * n


@everywhere
def test_the_first_are_taken_in_though_their_weights_vanish(backend: str) -> None:
    kept = torch.ones(1200, dtype=torch.bool)
    weights, taken = pc.ops.gram_filter(torch.ones(1200, 1200).double(), kept, 0.5)
    assert weights[0] == 0
    assert taken.all()


def call(*shape: int, n: int = 3, **options: Any) -> Any:
    kept = torch.ones(n, dtype=options.pop("kept", torch.bool))
    return pc.ops.gram_filter(torch.ones(shape, **options), kept, 1.0)


test_values = raising(
    ValueError,
    {
        "square": (lambda: call(3, 2), r"gram \[B, B\] and kept \[B\], got \(3, 2\) and \(3,\)"),
        "kept": (lambda: call(3, 3, n=2), r"got \(3, 3\) and \(2,\)"),
    },
)
test_types = raising(
    TypeError,
    {
        "gram": (lambda: call(3, 3, dtype=torch.int32), "gram to be float16.*got torch.int32"),
        "kept": (lambda: call(3, 3, kept=torch.uint8), "kept to be bool on cpu, got torch.uint8"),
    },
)
