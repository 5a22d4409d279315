"""linear_reduce: every way an output can come, against the reference in float64."""

from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_reduced_close, describe, in_float64, one_kind
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced
from pycoherence.sites import LinearSite

SPEC = pc.ops.specs["linear_reduce"]
DTYPES = [torch.float16, torch.float32, torch.float64]
WAYS = ["engine", "others"]
MASKS = sorted({1 << i | 1 << j for i in range(7) for j in range(7)} | {127})


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything from the tile engine, or as much as can be without it."""
    from pycoherence.triton_kernels import linear_reduce

    def chosen(b: int, t: int, i: int, o: int, kind: str, wanted: frozenset[str], *_: bool):
        only = frozenset() if t == 1 else frozenset({"second_moment", "sign_sum"})
        return wanted if request.param == "engine" else wanted & only

    monkeypatch.setattr(linear_reduce, "from_engine", chosen)
    return request.param


def check(*args: Any) -> tuple[Tensor, ...]:
    with pc.backend("triton"):
        found = torch.ops.pycoherence.linear_reduce(*args)
    expected = SPEC.reference(*in_float64(args))
    both = [one_kind(out) for out in (found, expected)]
    assert_reduced_close(*both, TOLERANCE[args[0].dtype], describe(args))
    return found


def factors(b: int, t: int, i: int, o: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(b, t, n).to(dtype) for n in (i, o)]


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("t", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_triton_positions_around_the_blocks(t: int, way: str) -> None:
    check(*factors(3, t, 33, 18), torch.randn(3), torch.randn(18, 33), 127)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [1, 5])
def test_triton_more_than_one_tile(t: int, dtype: torch.dtype, way: str) -> None:
    check(*factors(3, t, 67, 70, dtype), torch.randn(3), torch.randn(70, 67), 127)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("want", MASKS)
def test_triton_each_output_alone_and_every_pair(want: int, t: int, way: str) -> None:
    coef = torch.randn(3) if want & 36 and want % 3 else None
    check(*factors(3, t, 5, 4), coef, torch.randn(4, 5) if want & 2 else None, want)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("t", [1, 4])
def test_triton_what_is_not_finite_stays_in_its_example(t: int, way: str) -> None:
    x, g = factors(6, t, 5, 19)
    x[1, 0, 2], g[2, 0, 3], x[3, 0, 0] = torch.inf, torch.nan, -torch.inf
    g[3, 0, 1], g[4, 0, 2], x[4, 0, 1] = 0, torch.inf, 0
    check(x, g, None, torch.randn(19, 5), 127 - 32 - 64)
    coef = torch.tensor([1.0, 0, 0, 0, 0, 2])
    found = check(x, g, coef, None, 4)
    assert found[Reduced._fields.index("weighted_sum")].isfinite().all()


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_triton_strides(way: str) -> None:
    x, g = torch.randn(7, 5, 3).permute(2, 1, 0), torch.randn(3, 5, 8)[:, :, ::2]
    check(x, g, torch.randn(3), torch.randn(7, 4).mT, 127)
    check(x[:, :1].expand(3, 5, 7), g, None, None, 5)
    check(x[:1].expand(3, 5, 7), g[:, :1].expand(3, 5, 4), None, None, 13)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_triton_empty(shape: tuple[int, int, int, int], way: str) -> None:
    b, _, i, o = shape
    check(*factors(*shape), torch.randn(b), torch.randn(o, i), 127)


def test_triton_long_sums_keep_their_digits() -> None:
    check(torch.rand(1, 5000, 3), torch.rand(1, 5000, 2), None, None, 13)
    check(torch.rand(5000, 1, 3), torch.rand(5000, 1, 2), None, None, 12)


def test_triton_positions_that_cancel_keep_their_digits() -> None:
    x = torch.randn(3, 1, 40).expand(3, 12, 40) + 1e-2 * torch.randn(3, 12, 40)
    g = torch.randn(3, 12, 50)
    check(x, g - g.mean(1, keepdim=True), None, None, 1)


@pytest.mark.parametrize("sizes", [(1027, 9), (9, 1027), (1025, 1031)])
def test_triton_rows_that_no_vector_reads_are_padded(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycoherence.triton_kernels import linear_reduce

    monkeypatch.setattr(linear_reduce, "from_engine", lambda *args: args[5])
    x, g = factors(2, 3, *sizes, dtype=torch.float16)
    found = check(x, g, torch.randn(2), torch.randn(sizes[1], sizes[0]), 127)
    assert all(y.is_contiguous() for y in found)
    x[0, 1, 3], g[1, 2, 4] = torch.inf, -torch.inf
    check(x, g, None, None, 1)


def test_triton_reads_the_numbers_of_negated_views() -> None:
    z = torch.randn(3, 4, 5, dtype=torch.complex64)
    x, g = z.conj().imag, torch.randn(3, 4, 6)
    assert x.is_neg()
    with pc.backend("triton"):
        raw = LinearSite(x, g).reduce(("weighted_sum",)).weighted_sum
        zero = LinearSite(torch._efficientzerotensor((3, 4, 5)), g).reduce(("sq_norms",)).sq_norms
    expected = torch.einsum("bto,bti->oi", g.double(), -z.imag.double())
    torch.testing.assert_close(raw.double(), expected, rtol=1e-5, atol=1e-5)
    assert not zero.any()


def test_the_plan_gives_what_training_asks_for_in_one_pass() -> None:
    from pycoherence.triton_kernels.engine.cost import from_engine

    wanted = frozenset({"sq_norms", "weighted_sum"})
    assert from_engine(32, 1024, 4096, 4096, "half", wanted, False) == wanted
    # Products of Grams are so few here that they cost less than the end of each tile.
    assert from_engine(32, 64, 4096, 4096, "half", wanted, False) == frozenset()
    assert from_engine(32, 1, 4096, 4096, "half", wanted, False) == frozenset()
    moments = wanted | {"second_moment"}
    assert from_engine(32, 512, 4096, 4096, "half", moments, False) == moments
    assert from_engine(32, 1, 4096, 4096, "half", moments, False) == frozenset()


def test_triton_parts_of_the_batch_are_added_up() -> None:
    from pycoherence.triton_kernels.engine.factors import Factors, reduce

    x, g = factors(7, 5, 9, 8)
    wanted = frozenset({"sq_norms", "weighted_sum", "second_moment", "sign_sum"})
    whole = reduce(Factors.of_linear(x, g), wanted, parts=1)
    for parts in (2, 3, 7):
        found = reduce(Factors.of_linear(x, g), wanted, parts=parts)
        assert torch.equal(found["sq_norms"], whole["sq_norms"])
        for name in ("weighted_sum", "second_moment", "sign_sum"):
            assert len(found[name]) == parts
            torch.testing.assert_close(found[name].sum(0), whole[name][0], rtol=1e-5, atol=1e-5)


def test_triton_squares_have_the_range_of_their_dtype() -> None:
    x, g = torch.full((2, 1, 3), 1e25), torch.full((2, 1, 20), 1e-25)
    x[1], g[1], x[0, 0, 1] = 0, 1, torch.nan
    check(x, g, None, None, 8)
    check(x.double() ** 8, g.double() ** 8, None, None, 8)
