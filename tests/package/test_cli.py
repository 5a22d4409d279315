"""`python -m pycoherence info` and `selftest`; the demo has tests of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.backends import backends_of

import pycoherence as pc
from pycoherence import info
from pycoherence.cli import main
from pycoherence.extras import STUDIES
from pycoherence.ops.core import dispatch


def test_info_names_every_op_its_backend_and_why_not_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in text
    for op in pc.ops.specs:
        section = text.partition(f"  {op} ")[2].splitlines()
        assert section[0].strip() in backends_of(op)
        for backend in set(dispatch.BACKENDS) - set(backends_of(op)):
            assert any(f"not {backend}: " in line for line in section[1:4]), (op, backend)


def test_info_says_why_the_native_library_is_missing(
    capsys: pytest.CaptureFixture[str], missing_library: str
) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert missing_library in text.partition("\n_C_cpu")[2].splitlines()[0]
    assert f"not native: {missing_library}" in text


def test_info_names_the_command_that_adds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "build_record", dict)
    monkeypatch.setitem(info.EXTRAS, "no_such_package", ("wonders", "pip install wonders"))
    text = info.report()
    assert "cpu kernels: PYCOHERENCE_BUILD=cpu pip install" in text
    assert "wonders: pip install wonders" in text


def test_selftest_passes_with_a_line_for_each_op_and_backend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in pc.ops.specs:
        for backend in backends_of(op):
            assert any(line.split()[:3] == [op, "cpu", backend] for line in lines)
    assert all(line.endswith("ok") for line in lines[:-1])
    assert "all ops agree" in lines[-1]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda x: x * (1 + 1e-3),
        lambda x: x * float("nan"),
        lambda x: x[..., :0],
        lambda x: x * 0,
        lambda x: None,
    ],
    ids=["inexact", "nan", "shape", "zero", "missing"],
)
def test_selftest_fails_when_a_backend_is_wrong(
    break_it, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pc.ops.specs["affine_reduce"]
    reference = spec.reference

    def wrong(*args):
        out = reference(*args)
        if args[0].dtype == torch.float64:
            return out
        return tuple(None if x is None else break_it(x) for x in out)

    monkeypatch.setitem(spec.__dict__, "reference", wrong)
    assert main(["selftest"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.endswith("FAILED")]
    assert [line.split()[0] for line in failed] == ["affine_reduce"]
    assert lines[-1].startswith("FAILED")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["info", "--loud"]], ids=str)
def test_wrong_commands_explain_themselves(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m pycoherence" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pycoherence", "info"], capture_output=True, text=True, check=True
    )
    assert "linear_reduce" in done.stdout


def test_selftest_passes_whatever_memory_held_before() -> None:
    """glibc fills what kernels allocate by themselves, as torch does in these tests with NaN."""
    done = subprocess.run(
        [sys.executable, "-m", "pycoherence", "selftest"],
        env={**os.environ, "MALLOC_PERTURB_": "85"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    command = f"{sys.executable} -m pycoherence info | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    first, code = done.stdout.splitlines()
    assert first.startswith("pycoherence")
    assert int(code) in (0, 141)
    assert not done.stderr


def test_selftest_checks_only_what_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "row_sq_norms", "identity"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"row_sq_norms", "identity"}
    assert "these ops agree" in last
    with pytest.raises(SystemExit, match=r"selftest: expected ops out of .*linear_gram.* got nope"):
        main(["selftest", "nope"])


def test_help_says_the_defaults_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("matplotlib", "rich", "sklearn", "tqdm"):
        pytest.importorskip(package)
    from pycoherence import demo

    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for default in (demo.STEPS, demo.SEED, "cpu"):
        assert f"(default: {default})" in text


def test_advice_names_all_packages_of_the_extra() -> None:
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    names = {name.partition(">")[0] for name in (*extras["plot"], *extras["studies"])}
    assert names - {"pycoherence[plot]"} == set(STUDIES.split()[2:])


def test_importing_starts_nothing() -> None:
    """No compiler, no GPU, no plotting; and it must not be slow for want of care."""
    code = (
        "import sys, torch; import pycoherence; "
        "heavy = {'matplotlib', 'sklearn', 'tqdm', 'rich', 'triton', 'torch._dynamo', "
        "'torch._inductor', 'torch.utils.cpp_extension'} & set(sys.modules); "
        "print(sorted(heavy), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", code.replace("import pycoherence; ", "")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == before.stdout
