"""Rows, products of two rows, and dot products by products of matrices, in Triton's interpreter."""

import math
from itertools import islice
from typing import Any

import pytest
import torch
from support.backends import (
    TOLERANCE,
    assert_close,
    assert_reduced_close,
    describe,
    in_float64,
    one_kind,
)
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.core.outputs import names_of
from pycoherence.ops.core.spec import accumulate_dtype, tensors_of
from pycoherence.triton_kernels.affine_reduce import affine_reduce, affine_tiles
from pycoherence.triton_kernels.launch import finish
from pycoherence.triton_kernels.launch.finish import Finish
from pycoherence.triton_kernels.matmul.row_dots import row_dots
from pycoherence.triton_kernels.rows.rank_one import sq_norms_of_rank_one

# The interpreter is silently wrong for bfloat16.
DTYPES = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
BAD = (math.nan, math.inf, -math.inf)

of_all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


SPEC = pc.ops.specs["affine_reduce"]


def check_affine(*args: Any) -> None:
    """As the reference is in float64; as the fake kernel says."""
    expected = SPEC.reference(*in_float64(args))
    found = affine_reduce(*args)
    assert_reduced_close(found, expected, TOLERANCE[args[0].dtype], describe(args))
    for ours, fake in zip(tensors_of(found), tensors_of(SPEC.fake(*args)), strict=True):
        assert (ours.shape, ours.dtype) == (fake.shape, fake.dtype)
        assert ours.is_contiguous()


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_every_subset_of_outputs(parts: int) -> None:
    """From rows in one part, some, or more than are added up where they are read."""
    rows = torch.randn(3, parts, 5)
    coef, direction = torch.tensor([0.5, 0.0, -2.0]), torch.randn(5)
    for want in range(1, 128, 1 if parts == 1 else 6):
        tail = (coef if want & 36 else None, direction if want & 2 else None, want)
        expected = SPEC.reference(*in_float64((rows, None, None, None, *tail)))
        finish = Finish()
        found = finish.rows(rows, rows, *tail[:2], names_of(want))
        finish.run()
        assert_reduced_close(found, expected, 1e-5, f"{want:07b}")


HEADS = {
    "channels next to each other": lambda f: (f(2, 70, 150), f(2, 70, 150), f(2, 70, 1), None),
    "positions next to each other": lambda f: (f(3, 40, 70).mT, f(3, 40, 70).mT, f(1, 1, 40), None),
    "few channels": lambda f: (f(2, 300, 3), f(2, 300, 3), f(2, 300, 1), f(2, 300, 1)),
    "one channel": lambda f: (f(2, 300, 1), f(2, 300, 1), None, f(1, 300, 1)),
    "few positions": lambda f: (f(3, 3, 600), f(3, 3, 600), f(3, 1, 1), f(1, 3, 600)),
    "one position": lambda f: (f(3, 1, 130), None, None, None),
    "one position, scaled": lambda f: (f(3, 1, 130), f(3, 1, 130), None, f(3, 1, 130)),
    "the same for all positions": lambda f: (f(3, 1, 40).expand(3, 6, 40), None, None, None),
    "the same for all channels": lambda f: (f(3, 6, 1).expand(3, 6, 40), None, None, None),
    "gaps": lambda f: (f(3, 12, 82)[:, ::2, 1::2], f(6, 41, 3).permute(2, 0, 1), None, f(3, 6, 1)),
    "layouts that differ": lambda f: (f(2, 30, 20), f(2, 20, 30).mT, f(1, 1, 20), f(1, 1, 20)),
}


@of_all_dtypes
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_affine_layouts(head: Any, dtype: torch.dtype) -> None:
    g, *rest = head(lambda *shape: torch.randn(*shape).to(dtype))
    b, _, c = g.shape
    coef, direction = torch.rand(2 * b)[::2], torch.randn(c).double()
    check_affine(g, *rest, coef, direction, 127)


@pytest.mark.parametrize(("b", "c"), [(5, 1100), (130, 5), (1, 1)])
def test_rows_longer_and_more_than_a_program_takes(
    b: int, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "_LONGEST", 1024)
    monkeypatch.setattr(finish, "_MOST", 64)
    check_affine(torch.randn(b, 1, c), None, None, None, torch.randn(b), torch.randn(c), 127)


def test_sixty_four_bit_offsets() -> None:
    """The same numbers where strides are too large for 32 bits."""
    memory = torch.randn(50)
    far = torch.as_strided(memory, (1, 1, 40), (1, 2**33, 1))
    check_affine(far, far, None, None, None, None, 5)
    g = torch.empty(1, 2**20, 2**12, device="meta")
    assert affine_tiles(g).parts * affine_tiles(g).chunk >= 2**20


@pytest.mark.parametrize("layout", ["channels", "positions", "one channel"])
def test_long_sums_do_not_drift(layout: str) -> None:
    """All of one sign, where rounding adds up."""
    t, c = (20_000, 1) if layout == "one channel" else (20_000, 3)
    g, x = (torch.rand(1, t, c), torch.rand(1, t, c))
    if layout == "positions":
        g, x = (s.mT.contiguous().mT for s in (g, x))
    args = (g, x, None, None, None, None, 13)
    assert_reduced_close(affine_reduce(*args), SPEC.reference(*in_float64(args)), 1e-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("t", [1, 4, 70])
def test_what_is_not_finite_stays_in_its_example(t: int, bad: float) -> None:
    g, x, rstd = torch.randn(4, t, 6), torch.randn(4, t, 6), torch.rand(4, t, 1)
    x[1, t // 2, 5] = rstd[2, t // 2] = bad
    coef, direction = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.randn(6)
    for head in ((g, x, None, None), (g, x, None, rstd), (x, None, None, None)):
        for weights in (None, coef):
            args = (*head, weights, direction, 127)
            found, expected = affine_reduce(*args), SPEC.reference(*args)
            assert_reduced_close(one_kind(found), one_kind(expected), 1e-5)


def products(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms of the products themselves, in their dtype."""
    rows = g.to(accumulate_dtype(g.dtype)).mT * x.to(accumulate_dtype(x.dtype))
    return rows.flatten(1).square().sum(1)


@of_all_dtypes
@pytest.mark.parametrize(
    ("b", "i", "o"), [(3, 33, 5), (37, 1, 70), (1, 1, 1), (2, 2500, 40), (0, 3, 2), (2, 0, 3)]
)
def test_norms_of_products(b: int, i: int, o: int, dtype: torch.dtype) -> None:
    x, g = (
        torch.randn(b, 1, 2 * i).to(dtype)[..., ::2],
        torch.randn(o, 1, b).to(dtype).permute(2, 1, 0),
    )
    for left, right in ((x, g), (x, x), (x[:1].expand_as(x), g)):
        found = sq_norms_of_rank_one(left, right)
        assert found.dtype == accumulate_dtype(dtype)
        for one, other in zip(found, products(left.double(), right.double()), strict=True):
            assert_close(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_of_products_have_the_range_of_their_dtype(dtype: torch.dtype) -> None:
    """Wherever they are normal numbers they have all their digits; else they vanish or overflow."""
    info = torch.finfo(dtype)
    least = math.frexp(info.smallest_normal)[1] - 1
    most = math.frexp(info.max)[1]
    steps = torch.arange(least, most, 31 if dtype == torch.float64 else 4)
    one, two = (s.flatten() for s in torch.meshgrid(steps, steps, indexing="ij"))
    powers = torch.tensor([2.0**k for k in range(least, most)], dtype=torch.float64)
    x = (torch.tensor([1.25, 0.5, 0.0]) * powers[one - least, None]).to(dtype)[:, None]
    g = (torch.tensor([0.75, -1.0]) * powers[two - least, None]).to(dtype)[:, None]
    found, power = sq_norms_of_rank_one(x, g), 2 * (one + two)
    normal = (power > least + 3) & (power < most - 3)
    factor = (1.25**2 + 0.25) * (0.75**2 + 1)
    expected = factor * powers[power[normal] - least]
    torch.testing.assert_close(found[normal].double(), expected, rtol=8 * info.eps, atol=0)
    assert found[power >= most].isinf().all()
    assert (found[power < least - 60] == 0).all()


def test_norms_of_rows_of_many_magnitudes() -> None:
    x = torch.tensor([[1e-30, 1e30, 1.0], [1e13, 1e12, 9e11], [1e-12, 9e-13, 1e-13]])[:, None]
    g = torch.tensor([[1e-20, 1e-25], [1e-13, 1e-12], [1e12, 1e13]])[:, None]
    expected = products(x.double(), g.double()).float()
    torch.testing.assert_close(sq_norms_of_rank_one(x, g), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e-30, 1e30, *BAD])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("other", [0.0, 1.0, 1e-30])
def test_norms_of_products_that_are_not_finite(bad: float, fill: float, other: float) -> None:
    """Of infinity and zero, NaN; as in the products themselves."""
    x, g = torch.full((4, 1, 3), fill), torch.full((4, 1, 2), other)
    x[1, 0, 2] = g[2, 0, 1] = bad
    g[3, 0, 0] = 0
    for left, right in ((x, g), (g, x)):
        assert_close(sq_norms_of_rank_one(left, right), products(left, right), 1e-5)


@of_all_dtypes
@pytest.mark.parametrize(
    ("b", "t", "i", "o"),
    [
        *((3, 17, 33, 40), (5, 1, 7, 70), (1, 1, 1, 1), (2, 70, 300, 3), (40, 30, 9, 11)),
        *((0, 3, 4, 4), (4, 0, 3, 3), (3, 2, 0, 4), (3, 2, 4, 0)),
    ],
)
def test_dots(b: int, t: int, i: int, o: int, dtype: torch.dtype) -> None:
    x, g = (
        torch.randn(i, b, t).to(dtype).permute(1, 2, 0),
        torch.randn(b, t, 2 * o).to(dtype)[..., ::2],
    )
    for v in (torch.randn(o, i), torch.randn(i, o).mT, torch.randn(1, i).expand(o, i)):
        v = v.to(accumulate_dtype(dtype))
        expected = torch.einsum("bti,bto,oi->b", x.double(), g.double(), v.double())
        found = row_dots(x, g, v)
        assert found.dtype == accumulate_dtype(dtype)
        assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["x", "g"])
def test_dots_that_are_not_finite_stay_in_their_example(where: str, bad: float) -> None:
    x, g, v = torch.randn(3, 5, 33), torch.randn(3, 5, 7), torch.randn(7, 33)
    (x if where == "x" else g)[1, 2, -1] = bad
    assert row_dots(x, g, v).isfinite().tolist() == [True, False, True]


def test_all_plans_cover_all_positions() -> None:
    """On shapes that only a GPU has room for."""
    for b, t, c in ((8, 1024, 768), (1, 10**6, 1), (2, 10**6, 64), (4096, 49, 512), (3, 0, 5)):
        for g in (torch.empty(b, t, c, device="meta"), torch.empty(b, c, t, device="meta").mT):
            of = affine_tiles(g)
            assert (of.parts - 1) * of.chunk < max(t, 1) <= max(of.parts * of.chunk, 1)
            assert of.chunk % of.positions == 0
            assert of.chunk <= 512 * of.positions


def test_the_same_twice() -> None:
    args = next(islice(SPEC.samples("cpu", torch.float32), 1))
    pairs = zip(tensors_of(affine_reduce(*args)), tensors_of(affine_reduce(*args)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
