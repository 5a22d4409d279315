"""Random calls of the ops; see `fuzz_ops.py`."""

import fuzz_ops
import pytest


def test_five_hundred_calls_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_ops.fuzz(500, 20_000) == 0, capsys.readouterr().out


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_ops, "TOLERANCE", dict.fromkeys(fuzz_ops.TOLERANCE, 1e-17))
    assert fuzz_ops.fuzz(30, 0, show=0) > 3
