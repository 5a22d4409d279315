"""The template op: a contiguous copy, whatever comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import DTYPES, backends_of, on_each_cpu_backend
from support.strategies import LAYOUTS, lay_out

import pycoherence as pc


@given(
    st.lists(st.integers(0, 5), max_size=4), st.sampled_from(LAYOUTS), st.sampled_from([*DTYPES])
)
def test_copies_exactly(shape: list[int], layout: str, dtype: str) -> None:
    x = lay_out(torch.randn(shape).to(DTYPES[dtype]), layout)
    for backend in backends_of("identity"):
        with pc.backend(backend):
            copy = pc.ops.identity(x)
        assert torch.equal(copy, x)
        assert copy.dtype == x.dtype
        assert copy.is_contiguous()


@on_each_cpu_backend("identity")
def test_copies_large_and_special(backend: str) -> None:
    x = torch.randn(3, 2**14 + 1)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    copy = pc.ops.identity(x)
    torch.testing.assert_close(copy, x, rtol=0, atol=0, equal_nan=True)
    assert copy[0, 3].signbit()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_refuses_what_is_not_real_floating(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"identity: expected x to be float16, .*got torch"):
        pc.ops.identity(torch.zeros(3, dtype=dtype))
