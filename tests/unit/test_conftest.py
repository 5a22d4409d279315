"""That what the tests run under does what it says."""

import pytest
import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_uninitialised_memory_is_nan_in_python(dtype: torch.dtype) -> None:
    like = torch.zeros(5, dtype=dtype)
    for fresh in (
        torch.empty(3, 2, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(4),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype),
    ):
        assert fresh.isnan().all()


def test_uninitialised_memory_is_nan_in_native_code() -> None:
    """The kernel of identity allocates its output and writes it; in between torch must fill it."""
    op = torch.ops.pycoherence_native.identity
    if not torch._C._dispatch_has_kernel_for_dispatch_key("pycoherence_native::identity", "CPU"):
        pytest.skip("the native kernels are not built")
    with torch.autograd.profiler.profile() as profile:
        op(torch.ones(7))
    events = [event.name for event in profile.function_events]
    assert "aten::fill_" in events[events.index("pycoherence_native::identity") :]


def test_seeds_are_fixed() -> None:
    torch.testing.assert_close(torch.rand(1), torch.tensor([0.4962566]))
