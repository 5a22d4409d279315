"""gram_median against the points themselves, on every backend."""

from typing import Any

import pytest
import torch
from support import plain_rules as plain
from support.backends import on_each_place
from support.raising import raising
from support.settings import threads
from torch import Tensor

import pycoherence as pc

everywhere = on_each_place("gram_median")


def points(n: int, p: int, top: int = 0) -> Tensor:
    """Normal numbers, or whole ones up to `top`: with twins, and some of zero."""
    torch.manual_seed(n)
    if top:
        return torch.randint(-top, top + 1, (n, p)).double()
    return torch.randn(n, p, dtype=torch.float64)


def run(rows: Tensor, kept: Tensor, *args: Any) -> tuple[Tensor, int]:
    """The median itself, and the number of iterations."""
    gram = rows @ rows.mT
    gram = gram.masked_fill(~(kept & kept[:, None]), torch.nan)
    weights, iterations = pc.ops.gram_median(gram, kept, *args)
    assert (weights[~kept] == 0).all()
    return weights @ rows, int(iterations)


@everywhere
@pytest.mark.parametrize("top", [0, 1, 30])
@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 130])
def test_is_the_points_own(backend: str, n: int, iterations: int, top: int) -> None:
    rows, kept = points(n, 5, top), torch.arange(n) % 4 != 2
    for counted in (torch.ones_like(kept), kept):
        found, ran = run(rows, counted, 0.1, 0.0, iterations)
        expected = plain.geometric_median(rows[counted], iterations, 0.1, 0.0)
        assert (found - expected).norm() <= 1e-6 * (1 + rows.norm(dim=1).max())
        assert 1 <= ran <= iterations


@everywhere
def test_stops_when_little_changes(backend: str) -> None:
    rows, kept = points(20, 6), torch.ones(20, dtype=torch.bool)
    found, ran = run(rows, kept, 1e-6, 1e-3, 100)
    assert 1 < ran < 100
    again, same = run(rows, kept, 1e-6, 0.0, ran)
    assert torch.equal(found, again)
    assert same == ran


def test_threads_change_nothing() -> None:
    rows, kept = points(300, 6), torch.ones(300, dtype=torch.bool)
    gram, found = rows @ rows.mT, []
    for n in (1, 3):
        with threads(n):
            found.append(pc.ops.gram_median(gram, kept, 1e-6, 1e-6, 20)[0])
    assert torch.equal(*found)


@everywhere
def test_nothing_is_kept(backend: str) -> None:
    for n in (0, 3):
        kept = torch.zeros(n, dtype=torch.bool)
        weights, _ = pc.ops.gram_median(torch.ones(n, n), kept, 1.0, 0.0, 5)
        assert weights.tolist() == [0.0] * n


@everywhere
def test_a_number_that_is_not_finite_shows(backend: str) -> None:
    gram, kept = torch.eye(5), torch.ones(5, dtype=torch.bool)
    gram[1, 1] = torch.nan
    weights, _ = pc.ops.gram_median(gram, kept, 1.0, 0.0, 2)
    assert weights.isnan().all()


def call(*shape: int, n: int = 3, iterations: int = 1, **options: Any) -> Any:
    kept = torch.ones(n, dtype=options.pop("kept", torch.bool))
    return pc.ops.gram_median(torch.ones(shape, **options), kept, 1.0, 0.0, iterations)


test_values = raising(
    ValueError,
    {
        "square": (lambda: call(3, 2), r"gram \[B, B\] and kept \[B\], got \(3, 2\) and \(3,\)"),
        "kept": (lambda: call(3, 3, n=2), r"got \(3, 3\) and \(2,\)"),
        "iterations": (lambda: call(3, 3, iterations=0), "one iteration or more, got 0"),
    },
)
test_types = raising(
    TypeError,
    {
        "gram": (lambda: call(3, 3, dtype=torch.int32), "gram to be float16.*got torch.int32"),
        "kept": (lambda: call(3, 3, kept=torch.uint8), "kept to be bool on cpu, got torch.uint8"),
    },
)
