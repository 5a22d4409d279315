"""The benchmark of several processes: the truth is timed, and traffic is as formulas say."""

import json
from pathlib import Path

import pytest
import torch
from support.ranks import needs_gloo, run_ranks

from bench.distributed import cases, command, formulas, paper
from bench.distributed.cases import CASES, DDP
from bench.distributed.command import Work
from bench.distributed.formulas import Parameter, Place
from bench.shared.results import Row

MLP = [
    Parameter(*shape)
    for o, i in ((1024, 784), (1024, 1024), (10, 1024))
    for shape in ((o, i), (o, None))
]
BATCH = 4


def prepared(folder: Path, name: str, wrong: bool = False) -> Work:
    truth = cases.truth_of(cases.make(name, 2, BATCH))
    if wrong:
        truth.outputs["krum"] *= 1.01
    work = Work(name, 2, BATCH, 1, folder)
    torch.save(truth, work.truth)
    return work


def check_received(rows: list[Row]) -> None:
    """A rank receives most where its slices are the largest, or where it does not decide."""
    of = {
        "plain DDP": lambda at: formulas.Received(),
        "SqNorms": lambda at: formulas.Received(),
        "SqNorms, group": lambda at: formulas.sq_norms(MLP, at),
        "Gram, group": lambda at: formulas.gram(MLP, at),
        "Winsorized(2), group": lambda at: formulas.coordinate_rule(MLP, at, averaged=True),
        "Krum(1, m=4), group": lambda at: formulas.krum(MLP, at, m=4),
    }
    for row in rows:
        expected = max(of[row["name"]](Place((BATCH,) * 2, rank)).bytes() for rank in range(2))
        # Whether float32 products cancel is one byte.
        assert row["received_bytes"] == float(expected) + row["name"].startswith("Krum")
        assert row["header_bytes"] == row["headers"] * formulas.WIDTH * 8


@needs_gloo
def test_what_is_true_is_timed_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    options = ["--quick", "--models", "MLP", "--ranks", "2", "--out", str(out)]
    assert command.main(options) == 0
    result = json.loads(out.read_text())
    rows = result["models"]["MLP"]["ranks"]["2"]
    assert [row["name"] for row in rows] == [case.name for case in CASES]
    assert all(row["error"] <= command.LIMIT and row["seconds"] > 0 for row in rows)
    size = sum(p.size for p in MLP)
    sent = {row["name"]: row["wrapper_bytes"] for row in rows}
    assert sent == {case.name: case.averaged * 4 * size for case in CASES}
    check_received(rows)


@needs_gloo
def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    rows, same = run_ranks(2, command.rows_of, prepared(tmp_path, "GPT", wrong=True))
    assert [row["error"] for row in rows] == [row["error"] for row in same]
    untimed = {row["name"]: row["error"] for row in rows if "seconds" not in row}
    assert untimed.keys() == {"Krum(1, m=4), group"}
    assert untimed.popitem()[1] > command.LIMIT


def test_tables_hold_the_figures() -> None:
    row = {
        "error": 0.0, "seconds": 0.02, "ratio": 1.5, "received_bytes": 2e6, "wrapper_bytes": 1e6,
        "headers": 3, "header_bytes": 0, "peak_bytes": 2**21,
    }  # fmt: skip
    rows = [{"name": case.name, **row} for case in CASES]
    rows[-1] = {"name": CASES[-1].name, "error": 1.0}
    found = list(command.tables({"models": {"MLP": {"batch": 4, "ranks": {"2": rows}}}}))
    assert "| MLP, `B_r=4` | `R=2` |" in found
    for figure in ("20.0 ms", "3.00", "2"):
        assert f"| {DDP.name} | {figure} |" in found
    assert "| Gram, group | 1.50x |" in found
    assert found.count(f"| {CASES[-1].name} | - |") == 3


def test_paper_is_arithmetic() -> None:
    lines = list(paper.tables(ranks=(8,), bandwidth=50e9))
    assert "**Arithmetic, not a measurement.**" in lines[0]
    winsorized = [line for line in lines if "Winsorized" in line]
    # 7 * 64 * (4096 + 512) factors of 2 bytes; 7 * 64 * 4096^2 / 8 numbers of 4 bytes.
    assert winsorized[1] == "| `Winsorized` | 2.06 M, 0.0826 ms |"
    assert winsorized[3] == "| `Winsorized` | 940 M, 75.2 ms |"
    assert lines[-1].endswith("0.896 kB for 8.")


@pytest.mark.parametrize("name", cases.TASKS)
def test_tasks_are_the_same_in_all_processes(name: str) -> None:
    task, again = cases.make(name, 2, BATCH), cases.make(name, 2, BATCH)
    assert torch.equal(task.loss(), again.loss())
    assert len(task.y) == 2 * BATCH
    places = [cases.own(task, rank, 2) for rank in range(2)]
    assert [(place.start, place.stop) for place in places] == [(0, BATCH), (BATCH, 2 * BATCH)]
