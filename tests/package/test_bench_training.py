"""The benchmark in training: only what is true is timed; and the page made of its results."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import page as report
from bench.shared.tasks import TASKS, Task, make
from bench.training import command as training
from bench.training import memory
from bench.training.cases import OURS, PLAIN, Case, Step
from bench.training.truth import LIMITS, Truth

BATCH, LIMIT = 6, LIMITS[torch.float32]

new = functools.partial(make, "CNN", BATCH)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth.of(new())


def measured(name: str, scale: float) -> Case:
    """A rival whose norms are off by a factor."""

    def prepare(task: Task) -> Step:
        truth = Truth.of(task)
        return lambda: {"sq_norms": truth.outputs["sq_norms"].float() * scale}

    return Case(name, "rival", prepare)


def unable(task: Task) -> Step:
    raise NotImplementedError("no norms for\nthis")


def test_all_of_ours_agree_with_autograd(truth: Truth) -> None:
    rows, steps = training.check([PLAIN, *OURS], new, truth, LIMIT)
    for row in rows:
        assert row["reason"] is None
        assert row["error"] <= LIMIT
    seconds = training.interleave(steps, rounds=1)
    assert list(seconds) == [case.name for case in (PLAIN, *OURS)]


def test_rivals_that_are_wrong_or_unable_are_left_out(truth: Truth) -> None:
    cases = [measured("right", 1), measured("wrong", 1.01), Case("unable", "rival", unable)]
    rows, steps = training.check(cases, new, truth, LIMIT)
    assert steps.keys() == {"right"}
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons["right"] is None
    assert reasons["wrong"] == "wrong: error 1.0e-02"
    assert reasons["unable"] == "NotImplementedError: no norms for"


def test_failures_of_ours_are_raised(truth: Truth) -> None:
    with pytest.raises(NotImplementedError, match="no norms"):
        training.check([Case("broken", "ours", unable)], new, truth, LIMIT)


@pytest.mark.parametrize(("name", "parameters"), [("MLP", 1863690), ("CNN", 242122)])
def test_tasks_are_the_same_every_time(name: str, parameters: int) -> None:
    task, again = make(name, 2), make(name, 2)
    assert sum(p.numel() for p in task.model.parameters()) == parameters
    assert torch.equal(task.loss(), again.loss())
    assert TASKS[name][1] > len(task.y) == 2


@pytest.mark.parametrize(("name", "parameters"), [("GPT-2", 163037184), ("ResNet-18", 11689512)])
def test_models_for_a_gpu_have_their_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        task = TASKS[name][0](2)
        assert task.losses().shape == (2,)
        assert task.loss().shape == ()
    assert sum(p.numel() for p in task.model.parameters()) == parameters


def test_bfloat16_is_true_enough() -> None:
    new = functools.partial(make, "CNN", BATCH, "cpu", torch.bfloat16)
    cases = [case for case in OURS if case.name == "SqNorms"]
    _, steps = training.check(cases, new, Truth.of(new()), LIMITS[torch.bfloat16])
    assert steps.keys() == {"SqNorms"}


def test_memory_is_that_of_live_tensors() -> None:
    size = 2**28
    found = memory.growth(lambda: torch.ones(size, dtype=torch.uint8))
    if found < 0:
        pytest.skip("this system does not tell its peak memory")
    assert 0.99 * size < found < 1.2 * size  # the system counts in batches of pages


def result() -> dict[str, Any]:
    cases = [
        {"name": "plain", "kind": "plain", "reason": None, "ratio": 1.0, "peak_bytes": 2**20},
        {"name": "SqNorms", "kind": "ours", "reason": None, "ratio": 1.05, "peak_bytes": 2**21},
        {"name": "Rival", "kind": "rival", "reason": None, "ratio": 88.2, "peak_bytes": 2**30},
        {"name": "Other", "kind": "rival", "reason": "TypeError: why"},
    ]
    model = {"batch": 4, "plain_seconds": 0.0182, "cases": cases}
    return {
        "threads": 2,
        "machine": {"cpu": "X", "cores": 2, "capability": "AVX2"},
        "versions": {"torch": "2.13"},
        "commit": None,
        "models": {"MLP": model},
    }


def test_tables_hold_the_figures() -> None:
    assert list(report.times(result())) == [
        "|  | MLP, B=4 |",
        "| --- | --- |",
        "| plain forward + backward | 18.2 ms |",
        "| SqNorms | 1.05x |",
        "| Rival | 88x |",
        "| Other | - |",
    ]
    assert list(report.memory(result()))[2:] == [
        "| plain | 1 |", "| SqNorms | 2 |", "| Rival | 1024 |", "| Other | - |"
    ]  # fmt: skip
    assert list(report.reasons(result())) == ["- Other on MLP: TypeError: why"]


def row(ratio: float, backend: str = "native") -> dict[str, Any]:
    return {
        "op": "linear_reduce", "shape": {"B": 2}, "want": ["sq_norms"], "backend": backend,
        "check": "ok", "seconds": 1e-3, "fastest": "ghost", "ratio": ratio,
    }  # fmt: skip


def test_table_of_ops_tells_how_often_plain_torch_is_faster() -> None:
    rows = [row(0.5), row(0.25), row(2.0), row(20.0, "reference")]
    first, second = list(report.by_op(rows))[2:]
    assert first == "| `linear_reduce` | native | 3 | 0.50x | 0.25x | 2.00x | 1 |"
    assert second.startswith("| `linear_reduce` | reference | 1 |")
    assert list(report.slower(rows))[-1].endswith("| B=2 | sq_norms | 1.000 | ghost | 2.00x |")
    failed = [{**row(0.5), "check": "failed", "ratio": None}]
    assert "1 checks failed" in list(report.by_op(rows + failed))[-1]


def test_page_has_a_place_for_every_table() -> None:
    page = report.PAGE.read_text()
    for name in ("picture", "setting", "time", "memory", "reasons", "ops", "slower"):
        once = report.replace(page, name, "one\n\\1")
        assert f"<!-- {name} -->\none\n\\1\n<!-- /{name} -->" in once
        assert report.replace(once, name, "one\n\\1") == once
    with pytest.raises(ValueError, match="markers"):
        report.replace(page, "nonesuch", "")


def test_picture_is_drawn(tmp_path: Path) -> None:
    chart = pytest.importorskip("bench.report.chart")
    path = tmp_path / "picture.png"
    chart.draw(json.loads(json.dumps(result())), path)
    assert path.stat().st_size > 10_000
