"""linear_reduce at the edges of the tile engine's tiles."""

import pytest
import torch
from support.backends import DTYPES, TOLERANCE, assert_reduced_close, backends_of

import pycoherence as pc
from pycoherence.ops import Reduced

pytestmark = pytest.mark.skipif(
    "native" not in backends_of("linear_reduce"), reason="the native kernels are not built"
)

EVERYTHING = Reduced._fields

# Around multiples of what the engine takes at once: 4 and 8 outputs, 16 and 32 inputs, 256 of
# outputs, inputs, positions and examples.
SHAPES = [
    (3, 17, 63, 5),
    (1, 1, 1, 1),
    (1, 257, 31, 9),
    (2, 300, 65, 33),
    (1, 513, 16, 7),
    (4, 1, 129, 70),
    (40, 1, 33, 12),
    (2, 255, 15, 8),
    (2, 256, 32, 1),
    (1, 2, 47, 1030),
    (2, 3, 1, 1025),
    (2, 3, 700, 3),
    (300, 2, 5, 6),
]


def named(shape: tuple[int, ...]) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("BTIO", shape, strict=True))


def factors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    b, t, i, o = shape
    tensors = torch.randn(b, t, i), torch.randn(b, t, o), torch.randn(b), torch.randn(o, i)
    return tuple(x.to(dtype) for x in tensors)


def native(x, g, coef, direction, want) -> Reduced:
    tail = {"coef": coef} if coef is not None and "weighted_sum" in want else {}
    tail |= {"direction": direction} if "dots" in want else {}
    with pc.backend("native"):
        return pc.ops.linear_reduce(x, g, want=want, **tail)


def truth(x, g, coef, direction, want) -> Reduced:
    tail = {"coef": coef.double()} if coef is not None and "weighted_sum" in want else {}
    tail |= {"direction": direction.double()} if "dots" in want else {}
    with pc.backend("reference"):
        return pc.ops.linear_reduce(x.double(), g.double(), want=want, **tail)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_tile_edges(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = factors(shape, dtype)
    want = tuple(name for name in EVERYTHING if name != "sign_sum")
    tolerance = 1e-11 if dtype == torch.float64 else TOLERANCE[dtype]
    actual, expected = native(*tensors, want), truth(*tensors, want)
    assert_reduced_close(actual, expected, tolerance, named(shape))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_whole_numbers_are_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """So signs are too, and zeros are zeros; sums stay below 2^24."""
    tensors = tuple(x.clamp(-1, 1).round() for x in factors(shape, dtype))
    want = ("weighted_sum", "sign_sum")
    assert_reduced_close(native(*tensors, want), truth(*tensors, want), 0, named(shape))


def test_a_batch_is_the_sum_of_its_parts() -> None:
    x, g, _, _ = factors((6, 9, 20, 30), torch.float64)
    whole = native(x, g, None, None, ("sq_norms", "weighted_sum"))
    parts = [native(x[b : b + 1], g[b : b + 1], None, None, EVERYTHING[::2]) for b in range(6)]
    torch.testing.assert_close(whole.sq_norms, torch.cat([p.sq_norms for p in parts]))
    torch.testing.assert_close(whole.weighted_sum, sum(p.weighted_sum for p in parts))


def test_products_beyond_float32_do_not_overflow_on_the_way() -> None:
    """With one position the norm is a product of norms, of which one alone may be too large."""
    x, g = torch.full((2, 1, 3), 1e25), torch.full((2, 1, 4), 1e-20)
    found = native(x, g, None, None, ("sq_norms",)).sq_norms
    torch.testing.assert_close(found, torch.full((2,), 1.2e11))
