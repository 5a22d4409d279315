"""The benchmark of ops: all are measured, and nothing that is wrong gets a time."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pycoherence as pc
from bench.__main__ import COMMANDS
from bench.gpu import headline, predicted, selections, steps, table
from bench.ops import command
from bench.ops.candidates import measure
from bench.ops.cases import PLAIN, Case, has_plain
from bench.ops.ways import Way
from bench.shared import results, tasks
from bench.shared.results import Row

ROOT = Path(__file__).parents[2]
KEYS = {
    "op", "shape", "want", "dtype", "backend", "check", "error", "seconds", "runs", "plain_seconds",
    "fastest", "ratio",
}  # fmt: skip
SETTING = {"device", "threads", "machine", "versions", "commit"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_lists_the_commands() -> None:
    listed = bench("--help").stdout.partition("commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(len(line.split()) > 4 for line in listed)


@pytest.mark.parametrize("name", ["ops", "gpu"])
def test_commands_have_options_of_their_own(name: str) -> None:
    assert bench(name, "--help").stdout.startswith(f"usage: python -m bench {name} [-h]")


def quick(*ops: str) -> Iterator[Case]:
    return command.select(ops, "cpu", torch.float32, quick=True)


def test_all_but_the_template_have_plain_formulations() -> None:
    names = [op for op in pc.ops.specs if op != "identity"]
    assert [op for op in names if not has_plain(op)] == []


def test_every_plain_file_is_named_after_an_op() -> None:
    assert {path.stem for path in PLAIN.glob("[!_]*.py")} <= set(pc.ops.specs)


@pytest.mark.parametrize("op", [op for op in pc.ops.specs if has_plain(op)])
def test_backends_and_plain_formulations_agree(op: str) -> None:
    rows = list(command.run(quick(op), seconds=0))
    assert [row for row in rows if row["check"] != "ok"] == []
    assert "reference" in {row["backend"] for row in rows}
    for row in rows:
        assert row.keys() - {"skipped"} == KEYS
        assert row["ratio"] == row["seconds"] / row["plain_seconds"][row["fastest"]]
        assert row["plain_seconds"][row["fastest"]] == min(row["plain_seconds"].values())


def some_case() -> Case:
    return next(quick("linear_reduce"))


def test_plain_formulation_that_is_wrong_gets_no_time() -> None:
    case = some_case()
    right = case.ways["materialised"]

    def run_wrong(wanted: frozenset[str], **arguments) -> dict[str, torch.Tensor]:
        outputs = right.run(wanted, **arguments)
        return {name: value * 1.001 for name, value in outputs.items()}

    case = replace(case, ways={"right": right, "wrong": Way(run_wrong, right.workspace)})
    *backends, wrong = sorted(measure(case, 0), key=lambda row: "plain" in row)
    assert wrong["plain"] == "wrong"
    assert_failed(wrong)
    assert all(row["check"] == "ok" and row["fastest"] == "right" for row in backends)
    assert all(row["plain_seconds"].keys() == {"right"} for row in backends)


@pytest.mark.parametrize(
    "spoil", [lambda x: x * 1.001, lambda x: x * float("nan"), lambda x: x[1:]]
)
def test_op_that_disagrees_with_the_truth_gets_no_time(spoil) -> None:
    case = some_case()
    truth = {name: spoil(value) for name, value in case.truth().items()}
    rows = measure(replace(case, truth=lambda: truth), 0)
    assert {row["backend"] for row in rows if "backend" in row} >= {"reference"}
    for row in rows:
        assert_failed(row)


def assert_failed(row: Row) -> None:
    assert row["check"] == "failed"
    assert row["error"] > 1e-5
    assert not row.keys() & {"seconds", "ratio"}


def test_failures_are_written_and_counted(tmp_path: Path) -> None:
    case = some_case()
    right = measure(case, 0)
    wrong = measure(replace(case, truth=lambda: {"sq_norms": torch.zeros(3)}), 0)
    backends = sum("backend" in row for row in wrong)
    assert 0 < backends < len(wrong)
    out = tmp_path / "new" / "ops.jsonl"
    assert sum(map(command.failed, results.written([*right, *wrong], out))) == backends
    checks = [json.loads(line)["check"] for line in out.read_text().splitlines()]
    assert checks == ["ok"] * len(right) + ["failed"] * len(wrong)


def test_formulations_that_do_not_fit_are_told_and_left_out() -> None:
    case = some_case()
    huge = Way(case.ways["materialised"].run, lambda wanted, **arguments: 2.0**40)
    for row in measure(replace(case, ways={**case.ways, "huge": huge}), 0):
        assert row["skipped"] == {"huge": "needs 1024.0 GiB"}
        assert "huge" not in row["plain_seconds"]


def test_command_writes_json_lines(tmp_path: Path) -> None:
    out = tmp_path / "new" / "ops.jsonl"
    done = bench("ops", "--quick", "--ops", "dense_gram", "--seconds", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    for row in rows:
        assert row.keys() - {"skipped"} == KEYS | SETTING
        assert {"cpu", "cores"} <= row["machine"].keys()
        assert {"python", "torch", "pycoherence"} <= row["versions"].keys()


def test_headline_figures_are_true() -> None:
    for found in headline.headlines("cpu", quick=True):
        row = headline.measure(found)
        assert row["check"] == "ok", headline.say(row)
        assert row["ratio"] == row["seconds"] / row["torch_seconds"]
        assert found.what in headline.say(row)


def test_headline_figures_have_the_floors_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def new(*shape: int) -> torch.Tensor:
        return torch.ones(shape)

    found = selections.order(new, "winsorized_mean", 2, 128, 1, 32)
    assert headline.floors(found) == {} or torch.cuda.is_available()
    gpu = SimpleNamespace(
        clock_rate=10**6, multi_processor_count=100, memory_clock_rate=10**6, memory_bus_width=4000
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    floors = headline.floors(found)
    assert floors["minima and maxima"] == pytest.approx(32**2 * 128 * 12 / 6.4e12)
    assert floors["bytes"] == pytest.approx((2 * 128 * 32 * 4 + 32**2 * 4) / 1e12)
    median = selections.order(new, "median", 0, 128, 1, 1)
    assert median.extremes == 2 * 1471  # of Batcher's network


def test_predictions_grow_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def factors(t: int) -> torch.Tensor:
        return torch.empty(32, t, 4096, dtype=torch.bfloat16, device="meta")

    wanted = frozenset({"sq_norms", "weighted_sum"})
    times = [predicted.linear_reduce(factors(t), factors(t), wanted) for t in (1, 512, 1024)]
    assert times[0] is None  # another way is chosen
    assert 1.8 < times[2] / times[1] < 2
    flops = 2 * 32 * 512 * 4096**2
    # Norms make it no more than a third slower than the product alone.
    assert 0.75 < times[1] / predicted.of_products(flops, torch.bfloat16) < 1.33
    assert predicted.by_bytes(4.8e12) == pytest.approx(1.25, rel=1e-3)


def test_steps_are_divided_into_host_and_gpu(tmp_path: Path) -> None:
    rows = steps.measure(tasks.make("MLP", 2))
    ways = [(row["step"], row["way"]) for row in rows]
    assert ways[:2] == [("plain", "eager"), ("SqNorms", "eager")]
    assert all(row["ratio"] > 0 and row["host_seconds"] > 0 for row in rows[:2])


def test_the_table_of_a_gpu_has_what_is_there(tmp_path: Path) -> None:
    head = table.table(tmp_path)
    assert head.count("\n") == 1
    row = {"op": "linear_reduce", "what": "norms", "check": "ok", "predicted_seconds": 1e-3}
    row |= {"seconds": 2e-3, "ratio": 1.5, "goal": 1.33, "goal_seconds": None}
    lines = [row, row | {"check": "failed", "error": 1.0}]
    (tmp_path / "headline.jsonl").write_text("\n".join(map(json.dumps, lines)))
    step = {"model": "GPT-2", "step": "SqNorms", "way": "graph", "seconds": 3e-2, "ratio": 1.01}
    (tmp_path / "steps.jsonl").write_text(json.dumps(step))
    found = table.table(tmp_path)
    assert "| linear_reduce, norms | 1.000 ms | 2.000 ms | 1.50x | 1.33x |" in found
    assert "FAILED" in found
    assert "| GPT-2, SqNorms, graph |  | 30.00 ms | 1.01x | 1.03x |" in found


def test_script_for_a_gpu_explains_itself() -> None:
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "bench/gpu.sh OUT [--dry-run]" in done.stdout
