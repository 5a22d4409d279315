"""Measures every op against the fastest way to compute the same in plain torch.

    python -m bench ops [--device cuda] [--ops linear_reduce ...] [--quick] [--out FILE]

Each op runs on every backend that is here and on the shapes of its file in `plain/`. Results of
backends and of formulations are checked against the reference in float64 first; a wrong one is
reported, not timed, and if it is a backend's, the exit status is 1. They are JSON lines.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence

import torch

import pycoherence as pc
from bench.ops.candidates import measure
from bench.ops.cases import Case, cases, has_plain
from bench.shared import options, results
from bench.shared.results import Row

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""The usual ones there."""


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    torch.set_num_threads(given.threads)
    unknown = sorted(set(given.ops or ()) - set(pc.ops.specs))
    if unknown:
        raise SystemExit(f"expected ops among {', '.join(pc.ops.specs)}, got {', '.join(unknown)}")
    kind = "quick" if given.quick else "ops"
    out = given.out or results.file_for(kind, given.device, "jsonl")
    dtype = getattr(torch, given.dtype or DTYPES[given.device])
    rows = run(select(given.ops, given.device, dtype, given.quick), given.seconds)
    failures = sum(map(failed, results.written(rows, out, given.device)))
    print(f"written to {out}, {failures} checks failed" if failures else out)
    return 1 if failures else 0


def select(
    ops: Iterable[str] | None, device: str, dtype: torch.dtype, quick: bool
) -> Iterator[Case]:
    """The cases of the ops; of all that are registered if `None`."""
    for op in ops or pc.ops.specs:
        if has_plain(op):
            yield from cases(pc.ops.specs[op], device, dtype, quick)
        else:
            print(f"{op}: left out, since bench/ops/plain/{op}.py is not written")


def run(found: Iterable[Case], seconds: float) -> Iterator[Row]:
    """Measure case by case, and tell of each."""
    with torch.no_grad():
        for case in found:
            print(case, flush=True)
            for row in measure(case, seconds):
                print(f"    {_say(row)}", flush=True)
                yield row


def failed(row: Row) -> bool:
    """Whether a backend is wrong; plain torch may be."""
    return "backend" in row and row["check"] != "ok"


def _say(row: Row) -> str:
    name = row.get("backend") or f"plain torch, {row['plain']}"
    if row["check"] != "ok":
        return f"{name}: FAILED, error {row['error']:.1e}"
    time = f"{name:<10} {row['seconds'] * 1e3:9.3f} ms"
    if row["ratio"] is None:
        return f"{time}, nothing in plain torch fits"
    return f"{time}, {row['ratio']:5.2f}x of {row['fastest']}"


def _parser() -> argparse.ArgumentParser:
    parser = options.measuring("ops", __doc__, device="cpu", kept=True)
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="default: float32, on a GPU bfloat16",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="to repeat each case for")
    return parser
