"""What every test runs under: poisoned memory, fixed seeds, one set of random examples."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Read by cuBLAS when it starts; without it deterministic algorithms raise on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

hypothesis.settings.register_profile(
    "pycoherence", deadline=None, derandomize=True, database=None, max_examples=150
)


def pytest_configure() -> None:
    # Memory from torch.empty and its kin, in Python and in C++, starts as NaN: reading what was
    # never written shows.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    hypothesis.settings.load_profile("pycoherence")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def missing_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Nothing was compiled; the value is the reason that must be reported."""
    from pycoherence import info
    from pycoherence.ops.core import call, dispatch

    remembered = (
        dispatch._native_reason,
        dispatch.fast_backends,
        dispatch._report_missing_library,
        call._settled,
    )
    for function in remembered:
        function.cache_clear()
    for module in (dispatch, info):
        monkeypatch.setattr(module, "load_native", lambda device: f"_C_{device} was not built: why")
    yield "_C_cpu was not built: why"
    for function in remembered:
        function.cache_clear()
