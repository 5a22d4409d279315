"""Writes a table of what was predicted, what was measured and what is aimed at.

    python -m bench table FOLDER

The folder is that of `gpu.sh`. Figures that are not there are left out.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.shared import options
from bench.shared.results import Row

AIMS = {"eager": 1.08, "graph": 1.03}
"""Times of a step of GPT-2 small with norms, as a multiple of a plain one of the same way."""


def lines_of(path: Path) -> Iterator[Row]:
    """The rows of a file, if it is there."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def headline(row: Row) -> list[str]:
    """Cells: what, predicted, measured, as a multiple of torch, aim."""
    what = f"{row['op']}, {row['what']}"
    if row["check"] != "ok":
        return [what, "", f"FAILED, error {row['error']}", "", ""]
    predicted, goal = row["predicted_seconds"], row["goal_seconds"]
    aim = f"{row['goal']:.2f}x" if row["goal"] else ""
    return [
        what,
        "" if predicted is None else f"{predicted * 1e3:.3f} ms",
        f"{row['seconds'] * 1e3:.3f} ms",
        f"{row['ratio']:.2f}x",
        aim if goal is None else f"{goal * 1e3:g} ms",
    ]


def step(row: Row) -> list[str]:
    """The same of a step."""
    what = f"{row['model']}, {row['step']}, {row['way']}"
    if "seconds" not in row:
        return [what, "", row["check"], "", ""]
    host = f", host {row['host_seconds'] * 1e3:.2f} ms" if "host_seconds" in row else ""
    aim = f"{AIMS[row['way']]}x" if row["step"] == "SqNorms" else ""
    return [what, "", f"{row['seconds'] * 1e3:.2f} ms{host}", f"{row['ratio']:.2f}x", aim]


def table(folder: Path) -> str:
    """The table, in Markdown."""
    rows = [headline(row) for row in lines_of(folder / "headline.jsonl")]
    rows += [step(row) for row in lines_of(folder / "steps.jsonl")]
    head = [["what", "predicted", "measured", "of torch, or plain", "aim"], ["---"] * 5]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in head + rows)


def main(argv: Sequence[str]) -> int:
    parser = options.parser("table", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that was given to gpu.sh")
    print(table(parser.parse_args(argv).folder))
    return 0
