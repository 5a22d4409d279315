"""Measures every op against the fastest way to compute the same in plain torch.

    python bench/run.py [--device cuda] [--ops linear_reduce ...] [--quick] [--out FILE]

Each op runs on every backend that is here and on the shapes of its file in `plain/`. What a backend
or a formulation gives is checked against the reference in float64 first; what is wrong is reported,
not timed, and if it is a backend, the exit status is 1. Results are JSON lines.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import environment
import torch
from cases import Case, cases, has_plain
from harness import Row, measure

import pycoherence as pc

Record = dict[str, object]

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""What is usual there."""


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    unknown = sorted(set(options.ops or ()) - set(pc.ops.specs))
    if unknown:
        raise SystemExit(f"expected ops among {', '.join(pc.ops.specs)}, got {', '.join(unknown)}")
    options.out = options.out or _default_out(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, options.dtype or DTYPES[options.device])
    setting = environment.setting(options.device)
    with options.out.open("w", buffering=1) as out:  # a line is there once it is measured
        rows = run(select(options.ops, options.device, dtype, options.quick), options.seconds)
        failures = write(rows, setting, out.write)
    print(f"written to {options.out}, {failures} checks failed" if failures else options.out)
    return 1 if failures else 0


def select(
    ops: Iterable[str] | None, device: str, dtype: torch.dtype, quick: bool
) -> Iterator[Case]:
    """The cases of the ops; of all that are registered if `None`."""
    for op in ops or pc.ops.specs:
        if has_plain(op):
            yield from cases(pc.ops.specs[op], device, dtype, quick)
        else:
            print(f"{op}: left out, since bench/plain/{op}.py is not written")


def run(found: Iterable[Case], seconds: float) -> Iterator[Row]:
    """Measure case by case, and tell of each."""
    with torch.no_grad():
        for case in found:
            print(case, flush=True)
            for row in measure(case, seconds):
                print(f"    {_say(row)}", flush=True)
                yield row


def write(rows: Iterable[Row], setting: Record, write_line) -> int:
    """Write rows as JSON lines; returns how many of the backends' are failures."""
    failures = 0
    for row in rows:
        failures += "backend" in row and row["check"] != "ok"
        write_line(json.dumps(row | setting) + "\n")
    return failures


def _say(row: Row) -> str:
    name = row.get("backend") or f"plain torch, {row['plain']}"
    if row["check"] != "ok":
        return f"{name}: FAILED, error {row['error']:.1e}"
    time = f"{name:<10} {row['seconds'] * 1e3:9.3f} ms"
    if row["ratio"] is None:
        return f"{time}, nothing in plain torch fits"
    return f"{time}, {row['ratio']:5.2f}x of {row['fastest']}"


def _default_out(options: argparse.Namespace) -> Path:
    kind = "quick" if options.quick else "ops"
    return environment.RESULTS / f"{kind}-{environment.slug(options.device)}.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="default: float32, on a GPU bfloat16",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="to repeat each case for")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the harness")
    parser.add_argument("--out", type=Path, help="default: a file for this machine in results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
