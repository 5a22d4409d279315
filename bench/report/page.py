"""Writes the tables and the picture of `docs/benchmarks.md` from the results of this machine.

    python -m bench report [--machine NAME]

`NAME` is the part of the file names in `bench/results/` that tells the machine.
"""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.report import chart
from bench.shared import environment, options, results
from bench.shared.results import table

PAGE = environment.ROOT / "docs" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".png")

PICTURE_LINE = (
    "![Time of a forward and backward pass with statistics, as multiples of the plain pass]"
    f"({PICTURE.name})"
)

SLOWEST = 20
"""How many of the cases that plain torch is faster in are listed."""

Result = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    parser = options.parser("report", __doc__)
    parser.add_argument("--machine", default=environment.slug(), metavar="NAME")
    machine = parser.parse_args(argv).machine
    training = json.loads((results.FOLDER / f"training-{machine}.json").read_text())
    lines = (results.FOLDER / f"ops-{machine}.jsonl").read_text().splitlines()
    ops = [json.loads(line) for line in lines]
    page = PAGE.read_text()
    for name, made in {
        "picture": [PICTURE_LINE],
        "setting": setting(training),
        "time": times(training),
        "memory": memory(training),
        "reasons": reasons(training),
        "ops": by_op(ops),
        "slower": slower(ops),
    }.items():
        page = replace(page, name, "\n".join(made))
    PAGE.write_text(page)
    chart.draw(training, PICTURE)
    print(f"{PAGE}\n{PICTURE}")
    return 0


def replace(page: str, name: str, text: str) -> str:
    """Put a text between the markers of its name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    found, times = re.subn(
        pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL
    )
    if times != 1:
        raise ValueError(f"expected the markers <!-- {name} --> and <!-- /{name} --> once in page")
    return found


def setting(training: Result) -> Iterator[str]:
    machine, versions = training["machine"], training["versions"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}"
    yield f"{cpu}; {training['threads']} threads; commit `{training['commit']}`;"
    yield f"{', '.join(f'{name} {version}' for name, version in versions.items())}."


def times(training: Result) -> Iterator[str]:
    models = training["models"]
    head = ["", *(f"{name}, B={model['batch']}" for name, model in models.items())]
    plain = [f"{model['plain_seconds'] * 1e3:.1f} ms" for model in models.values()]
    rows = [["plain forward + backward", *plain]]
    rows += [[_title(name), *cells] for name, cells in _cells(training, "ratio", _ratio)]
    yield from table(head, rows)


def memory(training: Result) -> Iterator[str]:
    head = ["MiB", *training["models"]]
    cells = _cells(training, "peak_bytes", lambda size: f"{size / 2**20:.0f}", plain=True)
    yield from table(head, ([_title(name), *row] for name, row in cells))


def reasons(training: Result) -> Iterator[str]:
    """Why there is a dash."""
    for name, model in training["models"].items():
        for case in model["cases"]:
            if case["reason"]:
                yield f"- {_title(case['name'])} on {name}: {case['reason']}"


def by_op(ops: Sequence[Result]) -> Iterator[str]:
    head = ("op", "backend", "cases", "median", "best", "worst", "slower than plain torch")
    rows = []
    for op, backend in dict.fromkeys((row["op"], row.get("backend")) for row in ops):
        ratios = _ratios(row for row in ops if (row["op"], row.get("backend")) == (op, backend))
        if backend and ratios:
            middle = statistics.median(ratios)
            figures = (_ratio(x) for x in (middle, min(ratios), max(ratios)))
            slow = sum(ratio > 1 for ratio in ratios)
            rows.append((f"`{op}`", backend, str(len(ratios)), *figures, str(slow)))
    yield from table(head, rows)
    failed = [row for row in ops if row["check"] != "ok"]
    ours = sum("backend" in row for row in failed)
    if failed:
        yield (
            f"\n**{ours} checks failed** of backends, whose cases are not in the table, and "
            f"{len(failed) - ours} of plain formulations, which were not timed."
        )


def slower(ops: Sequence[Result]) -> Iterator[str]:
    rows = [row for row in ops if row.get("backend") == "native" and (row.get("ratio") or 0) > 1]
    rows.sort(key=lambda row: -row["ratio"])
    if not rows:
        yield "No case in which plain torch is faster than the native backend."
        return
    yield f"The {min(SLOWEST, len(rows))} of {len(rows)} native cases that lose most:\n"
    head = ("op", "shape", "wanted", "ms", "fastest plain torch", "ratio")
    yield from table(head, (_case(row) for row in rows[:SLOWEST]))


def _case(row: Result) -> tuple[str, ...]:
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    figures = f"{row['seconds'] * 1e3:.3f}", row["fastest"], _ratio(row["ratio"])
    return f"`{row['op']}`", shape, ", ".join(row["want"]), *figures


def _cells(
    training: Result, key: str, show, plain: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """For each case, one figure of each model."""
    models = [{c["name"]: c for c in m["cases"]} for m in training["models"].values()]
    for name, case in models[0].items():
        if plain or case["kind"] != "plain":
            found = (model[name].get(key) for model in models)
            yield name, [show(value) if value is not None else "-" for value in found]


def _title(name: str) -> str:
    return "plain" if name == "plain" else name.replace('"', "'")


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def _ratios(rows: Iterable[Result]) -> list[float]:
    return [row["ratio"] for row in rows if row.get("ratio") is not None]
