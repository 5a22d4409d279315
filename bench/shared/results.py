"""Files of results: JSON, with all that should be told of where they were measured; and tables."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.shared import environment

FOLDER = environment.ROOT / "bench" / "results"

Row = dict[str, Any]


def file_for(kind: str, device: str, ending: str) -> Path:
    """The file that keeps results of this machine."""
    return FOLDER / f"{kind}-{environment.slug(device)}.{ending}"


def written(rows: Iterable[Row], out: Path | None, device: str = "cpu") -> Iterator[Row]:
    """The rows, each a line of `out` once it is measured."""
    if out is None:
        yield from rows
        return
    setting = environment.setting(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", buffering=1) as file:
        for row in rows:
            file.write(json.dumps(row | setting) + "\n")
            yield row


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
