"""Which implementation runs, how to force one, and what is said when it cannot."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.backends import backends_of
from torch import Tensor

import pycoherence as pc
from pycoherence.info import report
from pycoherence.ops.core import call, dispatch
from pycoherence.ops.core.spec import OpSpec

X, G = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
ARGS = (X, G, None, None, 1)

needs_native = pytest.mark.skipif(
    "native" not in backends_of("linear_reduce"), reason="the native kernels are not built"
)


def picked(device: str = "cpu", args: tuple = ARGS) -> object:
    return dispatch.select(pc.ops.specs["linear_reduce"], device, args).kernel


def test_the_reference_runs_where_nothing_else_does() -> None:
    assert picked("meta") is pc.ops.specs["linear_reduce"].reference


@needs_native
def test_native_is_preferred() -> None:
    assert picked() is torch.ops.pycoherence_native.linear_reduce.default


def test_blocks_nest_and_end() -> None:
    reference = pc.ops.specs["linear_reduce"].reference
    free = picked()
    with pc.backend("reference"):
        assert picked() is reference
        with pc.backend(None):
            assert picked() is free
        assert picked() is reference
    assert picked() is free


def test_a_block_ends_after_an_error() -> None:
    free = picked()
    with pytest.raises(ZeroDivisionError), pc.backend("reference"):
        raise ZeroDivisionError
    assert picked() is free


def test_a_block_holds_in_all_threads() -> None:
    """Autograd runs backward passes in threads of its own."""
    found = []
    with pc.backend("reference"):
        thread = threading.Thread(target=lambda: found.append(picked()))
        thread.start()
        thread.join()
    assert found == [pc.ops.specs["linear_reduce"].reference]


@pytest.mark.parametrize("name", ["cuda", "", "Native", "reference "])
def test_unknown_names_are_refused(name: str) -> None:
    free = picked()
    with pytest.raises(ValueError, match="among native, triton, reference, got"):
        pc.backend(name).__enter__()
    assert picked() is free


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with (
        pc.backend("triton"),
        pytest.raises(
            RuntimeError, match=r"linear_reduce: backend 'triton'.*Triton kernel.*backend\(None\)"
        ),
    ):
        pc.ops.linear_reduce(X, G)


@pytest.fixture
def kernel_in_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """linear_reduce has a kernel in Triton, which is installed; neither is imported."""
    cached = (
        dispatch._triton_reason,
        dispatch.fast_backends,
        dispatch.kernel_of,
        call._settled,
    )

    def kernel(*args: object) -> None:
        """The kernel."""

    def find_spec(name: str) -> object:
        return None if name.endswith("dense_gram") else object()

    monkeypatch.setattr(dispatch.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        dispatch.importlib, "import_module", lambda name: SimpleNamespace(linear_reduce=kernel)
    )
    for function in cached:
        function.cache_clear()
    yield kernel
    for function in cached:
        function.cache_clear()


def test_triton_is_preferred_on_a_gpu(kernel_in_triton: Callable[..., None]) -> None:
    assert picked("cuda") is kernel_in_triton
    for name in ("cpu", "meta"):
        assert picked(name) is not kernel_in_triton
    assert "on CUDA devices" in str(dispatch.unavailable("linear_reduce", "triton", "cpu"))
    assert "no Triton kernel" in str(dispatch.unavailable("dense_gram", "triton", "cuda"))


@pytest.mark.usefixtures("kernel_in_triton")
def test_kernels_leave_old_gpus_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in str(dispatch.unavailable("linear_reduce", "triton", "cuda"))
    (tmp_path / "_C_cuda.abi3.so").touch()
    monkeypatch.setattr(dispatch, "_PACKAGE", tmp_path)
    assert "8.0" in str(dispatch.load_native.__wrapped__("cuda"))


@pytest.mark.usefixtures("kernel_in_triton")
def test_triton_leaves_other_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in str(dispatch.unavailable("linear_reduce", "triton", "cuda"))


def test_the_interpreter_has_to_be_asked_for(
    kernel_in_triton: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own switch says that kernels may run slowly, not that all should."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("cpu", "cuda"):
        assert dispatch.fastest(pc.ops.specs["linear_reduce"], name, ARGS).name != "triton"
        with pc.backend("triton"):
            assert picked(name) is kernel_in_triton


@pytest.mark.usefixtures("kernel_in_triton")
def test_the_interpreter_refuses_what_it_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = (X.bfloat16(), G.bfloat16(), *ARGS[2:])
    with pc.backend("triton"), pytest.raises(RuntimeError, match="bfloat16 wrongly"):
        picked(args=args)


@pytest.mark.usefixtures("kernel_in_triton")
def test_info_tells_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    section = report().partition("  linear_reduce ")[2].splitlines()
    assert section[0].split() != ["triton"]
    assert section[1].strip() == "not triton: interpreted kernels run only if asked for by name"


def test_forced_native_without_a_kernel_says_so() -> None:
    missing = next((op for op in pc.ops.specs if "native" not in backends_of(op)), None)
    if missing is None:
        pytest.skip("every op has a native kernel")
    args = next(iter(pc.ops.specs[missing].samples("cpu", torch.float32)))
    with pc.backend("native"), pytest.raises(RuntimeError, match=f"{missing}: backend 'native'"):
        getattr(torch.ops.pycoherence, missing)(*args)


@pytest.mark.usefixtures("missing_library")
def test_forced_native_without_the_library_says_so() -> None:
    with pc.backend("native"), pytest.raises(RuntimeError, match="_C_cpu was not built: why"):
        pc.ops.linear_reduce(X, G)


@pytest.mark.usefixtures("missing_library")
def test_a_missing_library_is_reported_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"slower reference path on cpu: _C_cpu was not.*info"):
        first = pc.ops.linear_reduce(X, G).sq_norms
    second = pc.ops.linear_reduce(X, G).sq_norms  # a warning would now be an error
    assert first.tolist() == second.tolist() == [180.0, 180.0]


@pytest.mark.usefixtures("missing_library")
def test_the_reference_on_purpose_does_not_warn() -> None:
    with pc.backend("reference"):
        pc.ops.linear_reduce(X, G)


def test_what_a_backend_does_not_support_falls_to_the_next() -> None:
    def never(*args: object) -> str:
        return "T is odd"

    spec = pc.ops.specs["linear_reduce"]
    picky = OpSpec(**{**vars(spec), "supports": {"native": never}})
    assert dispatch.select(picky, "cpu", ARGS).kernel is spec.reference
    if "native" in backends_of("linear_reduce"):
        assert dispatch.explain(picky, "cpu", ARGS)["native"] == "T is odd"
        with pc.backend("native"), pytest.raises(RuntimeError, match="T is odd"):
            dispatch.select(picky, "cpu", ARGS)


@needs_native
def test_known_arguments_run_what_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up once, and a block is heeded nevertheless."""
    ran, spec = [], pc.ops.specs["linear_reduce"]

    def reference(*args: object) -> object:
        ran.append(args)
        return spec.reference(*args)

    watched = OpSpec(**{**vars(spec), "reference": reference})
    monkeypatch.setitem(pc.ops.specs, "linear_reduce", watched)
    for forced, times in ((None, 0), ("reference", 1), ("native", 1), (None, 1)):
        with pc.backend(forced):
            assert call.call_unchecked("linear_reduce", *ARGS)[0].tolist() == [180.0, 180.0]
        assert len(ran) == times
    assert call._settled("linear_reduce", "cpu") is picked()
    assert call._settled("linear_order", "cpu") is None  # its arguments are asked


@needs_native
def test_backends_are_really_different_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every comparison of backends here would compare a thing with itself."""

    def broken(*args: object) -> tuple[Tensor, ...]:
        raise AssertionError("the reference ran")

    spec = pc.ops.specs["linear_reduce"]
    monkeypatch.setitem(spec.__dict__, "reference", broken)
    with pc.backend("native"):
        pc.ops.linear_reduce(X, G)
    with pc.backend("reference"), pytest.raises(AssertionError, match="the reference ran"):
        pc.ops.linear_reduce(X, G)


PRINT_PICKED = """
import torch, pycoherence as pc
from pycoherence.ops.core import dispatch
args = (torch.ones(2, 3, 4), torch.ones(2, 3, 5), None, None, 1)
spec = pc.ops.specs["linear_reduce"]
print("REFERENCE" if dispatch.select(spec, "cpu", args).kernel is spec.reference else "OTHER")
"""


def run(backend: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRINT_PICKED],
        env={**os.environ, "PYCOHERENCE_BACKEND": backend},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("reference", "REFERENCE"), pytest.param("native", "OTHER", marks=needs_native)],
)
def test_the_environment_variable_forces_a_backend(backend: str, expected: str) -> None:
    done = run(backend)
    assert done.stdout.split() == [expected], done.stderr


def test_the_environment_variable_must_name_a_backend() -> None:
    done = run("fastest")
    assert done.returncode != 0
    assert "expected a backend among native, triton, reference, got 'fastest'" in done.stderr
