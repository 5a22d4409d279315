"""Products of Grams, and the Gram that chooses between them and tiles, in Triton's interpreter."""

import pytest
import torch
from support.backends import TOLERANCE, assert_close, describe, dtypes_of, in_float64
from support.settings import workspace
from torch import Tensor

import pycoherence as pc
from pycoherence.triton_kernels import linear_gram as module
from pycoherence.triton_kernels.ghost import gram as ghost_gram
from pycoherence.triton_kernels.ghost.gram import gram_of_products
from pycoherence.triton_kernels.ghost.norms import ghost_sq_norms
from pycoherence.triton_kernels.launch.finish import finished
from pycoherence.triton_kernels.linear_gram import linear_gram, products_are_cheaper

DTYPES = dtypes_of("triton")
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def factors(b: int, t: int, i: int, o: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, i, generator=generator), torch.randn(b, t, o, generator=generator)


def cancelling(b: int, t: int, i: int, o: int) -> tuple[Tensor, Tensor]:
    """What all positions share meets output gradients that add up to nearly nothing."""
    x, g = factors(b, t, i, o)
    return x[:, :1] + 1e-3 * x, g - g.mean(1, keepdim=True)


def norms(x: Tensor, g: Tensor) -> Tensor:
    x, g = in_float64((x, g))
    return torch.bmm(g.mT, x).flatten(1).square().sum(1)


def gram(*args: Tensor) -> Tensor:
    truth = pc.ops.specs["linear_gram"].reference(*in_float64((*args, None, None)[:4]))
    assert isinstance(truth, Tensor)
    return truth


def assert_each_close(found: Tensor, x: Tensor, g: Tensor) -> None:
    tolerance = TOLERANCE[x.dtype]
    for one, truth in zip(found, norms(x, g), strict=True):
        assert_close(one, truth, tolerance, describe((x, g)))


SHAPES = [
    (3, 1, 17, 9),
    (1, 2, 1, 1),
    (2, 16, 5, 66),
    (4, 33, 130, 3),
    (2, 130, 33, 70),
    (3, 20, 80, 32),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, g = (factor.to(dtype) for factor in factors(*shape))
    found = finished(ghost_sq_norms, x, g)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_each_close(found, x, g)


def test_norms_of_any_strides() -> None:
    x = torch.randn(6, 13, 4).permute(2, 1, 0)
    g = torch.randn(4, 13, 18)[:, :, ::2]
    assert_each_close(finished(ghost_sq_norms, x, g), x, g)
    x, g = torch.randn(1, 5, 6).expand(3, 5, 6), torch.randn(3, 1, 7).expand(3, 5, 7)
    assert_each_close(finished(ghost_sq_norms, x, g), x, g)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)], ids=str)
def test_nothing_adds_up_to_zero(shape: tuple[int, ...]) -> None:
    x, g = factors(*shape)
    assert torch.equal(finished(ghost_sq_norms, x, g), torch.zeros(shape[0]))
    assert torch.equal(linear_gram(x, g), torch.zeros(shape[0], shape[0]))
    assert torch.equal(linear_gram(x, g, *factors(2, 1, *shape[2:])), torch.zeros(shape[0], 2))


@each_dtype
def test_norms_that_cancel_keep_their_digits(dtype: torch.dtype) -> None:
    """Among others that do not, and one that is zero."""
    x, g = (factor.to(dtype) for factor in cancelling(5, 12, 70, 90))
    x[1], g[3] = torch.randn(12, 70), 0
    assert_each_close(finished(ghost_sq_norms, x, g), x, g)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("t", [1, 4, 70])
def test_norms_that_are_not_finite(t: int, where: str, bad: float) -> None:
    x, g = factors(3, t, 33, 5)
    (x if where == "x" else g)[1, t // 2, -1] = bad
    found = finished(ghost_sq_norms, x, g)
    assert_close(found, norms(x, g), 1e-5)
    assert found.isfinite().tolist() == [True, False, True]


def test_norms_whose_products_leave_the_range() -> None:
    x, g = (1e-18 * torch.ones(2, 3, 4), 1e21 * torch.ones(2, 3, 5))
    assert_close(finished(ghost_sq_norms, x, g), norms(x, g), 1e-5)


PAIRS = [
    ((5, 1), (3, 1), 7, 19),
    ((1, 1), (1, 1), 1, 1),
    ((70, 1), (33, 1), 130, 51),
    ((3, 17), (5, 9), 33, 5),
    ((9, 2), (7, 3), 10, 20),
    ((20, 3), (4, 2), 80, 32),  # in wide loads
    ((2, 130), (3, 1), 4, 70),
    ((2, 70), (1, 65), 20, 9),
]


def arguments(
    pair: tuple[tuple[int, int], tuple[int, int], int, int], dtype: torch.dtype, batches: int
) -> tuple[Tensor, ...]:
    one, two, i, o = pair
    both = *factors(*one, i, o), *factors(*two, i, o, seed=1)
    return tuple(factor.to(dtype) for factor in both[: 2 * batches])


@each_dtype
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_products(pair, batches: int, dtype: torch.dtype) -> None:
    args = arguments(pair, dtype, batches)
    found = gram_of_products(*args)
    assert found.is_contiguous()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, gram(*args), TOLERANCE[dtype], describe(args))
    assert batches == 2 or torch.equal(found, found.mT)


@each_dtype
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("pair", PAIRS[2:5], ids=str)
def test_products_in_parts(
    pair, batches: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than features, too."""
    monkeypatch.setattr(ghost_gram, "_parts_for", lambda *args: parts)
    args = arguments(pair, dtype, batches)
    found = gram_of_products(*args)
    assert_close(found, gram(*args), TOLERANCE[dtype], describe(args))
    assert batches == 2 or torch.equal(found, found.mT)


@pytest.mark.parametrize(
    ("t", "dtype"), [(12, torch.float16), (12, torch.float32), (70, torch.float32)], ids=str
)
@pytest.mark.parametrize("batches", [1, 2])
def test_products_that_cancel_keep_their_digits(t: int, batches: int, dtype: torch.dtype) -> None:
    both = *cancelling(2, t, 17, 30), *cancelling(1, t, 17, 30)
    args = tuple(factor.to(dtype) for factor in both[: 2 * batches])
    found = gram_of_products(*args)
    assert_close(found, gram(*args), 1e-5, describe(args))
    assert batches == 2 or torch.equal(found, found.mT)


@pytest.mark.parametrize("t", [1, 5])
def test_products_that_leave_the_range(t: int) -> None:
    x, g = (1e-18 * torch.ones(2, t, 4), 1e21 * torch.ones(2, t, 5))
    assert_close(gram_of_products(x, g), gram(x, g), 1e-5)


@pytest.mark.parametrize(
    ("t", "bad"), [(1, float("inf")), (5, float("nan")), (5, float("inf")), (70, float("nan"))]
)
def test_products_that_are_not_finite(t: int, bad: float) -> None:
    """In the rows and columns of the example, in all of them."""
    x, g = factors(3, t, 17, 5)
    x[1, t // 2, -1] = bad
    for args in ((x, g), (x, g, *factors(2, 2, 17, 5))):
        found = gram_of_products(*args)
        touched = ~gram(*args).isfinite()
        assert touched[1].all()
        assert torch.equal(found.isfinite(), ~touched)
        clean = torch.where(touched, 0, gram(*args))
        assert_close(torch.where(touched, 0, found), clean, 1e-5)


@each_dtype
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("size", [1, 1000, 2**26])
def test_tiles_of_any_size(
    size: int, batches: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "products_are_cheaper", lambda *args: False)
    args = arguments(((3, 7), (2, 4), 5, 6), dtype, batches)
    with workspace(size):
        found = linear_gram(*args)
    assert_close(found, gram(*args), TOLERANCE[dtype], describe(args))
    assert batches == 2 or torch.equal(found, found.mT)


def test_the_cheaper_way() -> None:
    """As counted by hand: 16 * 16 * 2 T^2 * 64 against 32 * 32 * (16 T + 16 * 16)."""
    half, full = torch.float16, torch.float32
    assert products_are_cheaper((10**6, 1), None, 1, 1, full)
    assert products_are_cheaper((16, 6), None, 32, 32, full)
    assert not products_are_cheaper((16, 7), None, 32, 32, full)
    assert products_are_cheaper((16, 7), None, 32, 32, half)
    assert products_are_cheaper((16, 5), (16, 5), 32, 32, full)
    assert not products_are_cheaper((16, 6), (16, 6), 32, 32, full)
    assert not products_are_cheaper((128, 512), None, 4096, 4096, half)
    assert products_are_cheaper((8, 256), None, 4096, 4096, full)
