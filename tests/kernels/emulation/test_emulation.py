"""The emulation of a GPU computes what one would, and finds what is planted in kernels."""

import numpy as np
import pytest
from support.emulated import drive


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("size", [0, 1, 31, 256, 1000])
def test_identity(emulation, dtype, size):
    x = (100 * random(size)).astype(dtype) if dtype != np.uint16 else np.arange(size, dtype=dtype)
    out = np.zeros_like(x)
    emulation.identity(x, out)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("size", [1, 64, 150])
def test_sum_by_shared_memory_and_shuffles_over_blocks_in_any_order(ordered, size):
    x, out = random(5, size), np.zeros(5, np.float32)
    ordered.sum(x, out)
    np.testing.assert_allclose(out, x.sum(1, dtype=np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lanes_see_those_of_their_warp(emulation, dtype):
    x = np.arange(-3, 61, dtype=dtype)
    out, negative = np.zeros_like(x), np.zeros(64, np.int32)
    emulation.lanes(x, out, negative, 5)
    np.testing.assert_array_equal(out, x[np.arange(64) ^ 5])
    np.testing.assert_array_equal(negative, np.arange(64) < 32)


def test_votes_of_a_warp(emulation):
    x = np.ones(64, np.float32)
    x[[3, 31]] = -7, -1
    which, first = np.zeros(64, np.uint32), np.zeros(64, np.float32)
    emulation.votes(x, which, first)
    np.testing.assert_array_equal(which, [2**3 + 2**31] * 32 + [0] * 32)
    np.testing.assert_array_equal(first, [-7] * 32 + [0] * 32)


def bits(x, dtype):
    """As float16, or as the bits of bfloat16 for uint16."""
    return x.astype(np.float16) if dtype == np.float16 else (x.view(np.uint32) >> 16).astype(dtype)


def floats(x):
    if x.dtype == np.float16:
        return x.astype(np.float32)
    return (x.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_matrix_product_of_a_warp(emulation, dtype):
    a, b = bits(random(16, 16), dtype), bits(random(16, 8), dtype)
    out = np.zeros((16, 8), np.float32)
    emulation.mma(a, b, out)
    np.testing.assert_allclose(out, floats(a) @ floats(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_halves_of_all_bits(emulation, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    out = np.zeros(x.shape, np.float32)
    emulation.to_float(x, out)
    np.testing.assert_array_equal(out, floats(x))


def test_no_wait_for_copies_gives_nan(emulation):
    out = np.zeros(2, np.float32)
    emulation.sum_no_wait(random(2, 150), out)
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("sum_some_end", "divergent: 40 threads of 64 wait at line .*, and 24 have ended"),
        ("sum_other_line", "divergent: threads meet from line .* and from line"),
    ],
)
def test_divergent_sync_is_an_error(emulation, call, says):
    with pytest.raises(RuntimeError, match=says):
        getattr(emulation, call)(random(2, 150), np.zeros(2, np.float32))


def test_what_depends_on_the_order_of_blocks_shows(ordered, request):
    x, out = random(5, 64), np.zeros(5, np.float32)
    ordered.sum_order(x, out)
    assert np.allclose(out, x.sum(1).cumsum()) == ("forward" in request.node.name)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels_are_clean(emulation, sanitizer):
    done = drive(sanitizer)
    assert done.returncode == 0, done.stderr
    assert {"identity", "sum"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("sanitizer", "planted", "says"),
    [
        ("thread", "no_sync", "data race"),
        ("address", "outside", "heap-buffer-overflow"),
        ("address", "outside_shared", "heap-buffer-overflow"),
    ],
)
def test_sanitizers_find_what_is_planted(emulation, sanitizer, planted, says):
    done = drive(sanitizer, f"planted_{planted}")
    assert done.returncode != 0
    assert says in done.stderr
    assert "samples.cuh" in done.stderr
