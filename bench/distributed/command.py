"""Measures statistics and rules over the examples of several processes, beside plain DDP.

    python -m bench distributed [--ranks 1 2 4] [--models MLP ...] [--rounds N] [--quick]
                                [--out FILE]
    python -m bench distributed --paper

Processes of one thread each talk over the loopback by gloo. Every case is first compared with
autograd on the examples of all; then all take turns, in another order in every round, and a step
takes as long as its slowest rank. Figures are medians, as multiples of plain DDP on as many ranks.
Processes that share cores wait for each other: to compare different numbers of them tells nothing.

The numbers that come to each rank are counted, those of DDP's own sums computed by a formula.
Peak memory is that of fresh processes. `--paper` measures nothing, and prints what the formulas
give for up to 1,024 ranks.
"""

import argparse
import gc
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

from bench.distributed import cases, paper
from bench.distributed.cases import CASES, DDP, TASKS, Case
from bench.distributed.traffic import counted
from bench.shared import environment, options, results
from bench.shared.results import Row
from bench.shared.timing import seconds_of
from bench.training import memory
from bench.training.cases import Step
from bench.training.truth import LIMITS, Truth

LIMIT = LIMITS[torch.float32]


@dataclass(frozen=True)
class Work:
    """One run of all cases, in processes of their own.

    Attributes:
        model: Its name in `TASKS`.
        ranks: How many processes.
        batch: Examples of each.
        rounds: How often each step is timed; never for memory.
        folder: For what processes tell each other, and rank 0 at the end.
    """

    model: str
    ranks: int
    batch: int
    rounds: int
    folder: Path

    @property
    def truth(self) -> Path:
        return self.folder / "truth.pt"

    @property
    def out(self) -> Path:
        return self.folder / "rows.json"


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    if given.paper:
        print("\n".join(paper.tables()))
        return 0
    torch.set_num_threads(1)
    out = given.out or results.file_for("distributed", "cpu", "json")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = dict[str, Row]()
    result = environment.setting() | {"rounds": given.rounds, "limit": LIMIT, "models": found}
    for name in given.models:
        batch = 4 if given.quick else TASKS[name][1]
        found[name] = {"batch": batch, "ranks": {}}
        for ranks in given.ranks:
            print(f"{name}: {ranks} ranks of {batch} examples", flush=True)
            rounds = 1 if given.quick else given.rounds
            rows = run(name, ranks, batch, rounds, has_memory=not given.quick)
            found[name]["ranks"][str(ranks)] = rows
            out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(tables(result)))
    wrong = [
        f"FAILED {name} on {ranks} ranks: {row['name']}, error {row['error']:.1e}"
        for name, model in found.items()
        for ranks, rows in model["ranks"].items()
        for row in rows
        if not row["error"] <= LIMIT
    ]
    print("\n".join([*wrong, str(out)]))
    return 1 if wrong else 0


def run(name: str, ranks: int, batch: int, rounds: int, has_memory: bool) -> list[Row]:
    """A row for each case, with times, traffic and memory of those that are right."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(name, ranks, batch, rounds, Path(folder))
        torch.save(cases.truth_of(cases.make(name, ranks, batch)), work.truth)
        rows = _in_processes(work)
        if has_memory:
            # Large blocks go back to the system when freed, so that peaks are of live tensors.
            with mock.patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": str(2**17)}):
                peaks = _in_processes(Work(name, ranks, batch, 0, Path(folder)))
            for row, peak in zip(rows, peaks, strict=True):
                row.update(peak)
    return rows


def _in_processes(work: Work) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_rank, (work, store), nprocs=work.ranks)
    return json.loads(work.out.read_text())


def _rank(rank: int, work: Work, store: str) -> None:
    """The work of one process."""
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": work.ranks}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    try:
        rows = rows_of(rank, work)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        work.out.write_text(json.dumps(rows))


def rows_of(rank: int, work: Work) -> list[Row]:
    """The rows that a process finds, the same in all."""
    task = cases.make(work.model, work.ranks, work.batch)
    size = sum(p.numel() for p in task.model.parameters())
    own = cases.own(task, rank, work.ranks)
    truth: Truth = torch.load(work.truth, weights_only=False)
    mine = cases.part(task, rank, work.ranks)
    steps = {case.name: case.prepare(mine) for case in CASES}
    errors = [cases.error(case, steps[case.name], mine, truth, own) for case in CASES]
    rows: list[Row] = [
        {"name": case.name, "error": error}
        for case, error in zip(CASES, _largest(errors), strict=True)
    ]
    right = {row["name"]: steps[row["name"]] for row in rows if row["error"] <= LIMIT}
    found = _times(right, work.rounds) if work.rounds else _peaks(right)
    for case, row in zip(CASES, rows, strict=True):
        if case.name in right:
            row.update(found[case.name])
            if work.rounds:
                row.update(_traffic(case, right[case.name], size, work.ranks))
    return rows


def _times(steps: Mapping[str, Step], rounds: int) -> dict[str, Row]:
    """Median seconds of each step, all of them taking turns."""
    samples = {name: list[float]() for name in steps}
    # All ranks draw the same orders, or they would wait for each other.
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            dist.barrier()
            samples[name].append(seconds_of(steps[name]))
        gc.collect()
    gc.enable()
    medians = {
        name: torch.tensor(_largest(found), dtype=torch.float64).median().item()
        for name, found in samples.items()
    }
    plain = medians.get(DDP.name, float("nan"))
    return {name: {"seconds": x, "ratio": x / plain} for name, x in medians.items()}


def _peaks(steps: Mapping[str, Step]) -> dict[str, Row]:
    """By how many bytes each step raises the peak of the rank that it raises most."""
    found: dict[str, Row] = {}
    for name, step in steps.items():
        dist.barrier()
        (peak,) = _largest([memory.growth(step)])
        found[name] = {"peak_bytes": None if peak < 0 else int(peak)}
    return found


def _traffic(case: Case, step: Step, size: int, ranks: int) -> Row:
    """The bytes that come to the rank that receives most in a step."""
    with counted() as found:
        step()
    (received,) = _largest([float(found.bytes)])
    wrapper = Fraction(2 * (ranks - 1) * size * 4, ranks) if case.averaged else 0
    return {
        "received_bytes": received,
        "wrapper_bytes": float(wrapper),
        "headers": found.headers,
        "header_bytes": found.header_bytes,
    }


def _largest(values: Sequence[float]) -> list[float]:
    """The largest of all ranks; NaN where one has it."""
    x = torch.tensor(values, dtype=torch.float64)
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.stack(found).amax(0).tolist()


def tables(result: Row) -> Iterator[str]:
    """Those of a result, as Markdown."""
    for name, model in result["models"].items():
        runs = {ranks: {row["name"]: row for row in rows} for ranks, rows in model["ranks"].items()}
        head = [f"{name}, `B_r={model['batch']}`", *(f"`R={ranks}`" for ranks in runs)]
        for title, cell in TABLES.items():
            rows = [
                [case.name, *(cell(case, run[case.name]) for run in runs.values())]
                for case in CASES
            ]
            yield from ("", f"{name}: {title}.", "", *results.table(head, rows))
    yield ""


def _time(case: Case, row: Row) -> str:
    if "seconds" not in row:
        return "-"
    return f"{row['seconds'] * 1e3:.1f} ms" if case is DDP else f"{row['ratio']:.2f}x"


def _received(case: Case, row: Row) -> str:
    if "received_bytes" not in row:
        return "-"
    return f"{(row['received_bytes'] + row['wrapper_bytes'] + row['header_bytes']) / 1e6:.2f}"


def _memory(case: Case, row: Row) -> str:
    peak = row.get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:.0f}"


TABLES = {
    "time, as a multiple of plain DDP": _time,
    "MB that a rank receives in a step, DDP's own sum included": _received,
    "peak memory of a rank, MiB": _memory,
}


def _parser() -> argparse.ArgumentParser:
    parser = options.measuring("distributed", __doc__, kept=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="R")
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--paper", action="store_true", help="print tables of formulas alone")
    return parser
