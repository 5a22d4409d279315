"""The results of a study: a report to read, its pictures, and all numbers."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sklearn
import torch
from matplotlib.figure import Figure

import pycoherence as pc
from pycoherence.studies.measures import Measured, first, late
from pycoherence.studies.runs import Key, Run, plain, replacing

ROUGH = (
    "**A rough look:** one seed of small networks that are trained for a short time. It shows that "
    "the study works; what it finds, a run without `--quick` has to tell."
)
"""The heading of the report of a rough look."""


@dataclass
class Report:
    """Collects text, tables, pictures and results, and writes them at the end.

    Attributes:
        title: The headline of `report.md`.
        results: The content of `results.json` beside the settings and the runs.
    """

    title: str
    results: dict[str, Any] = field(default_factory=dict)
    _parts: list[str] = field(default_factory=list)
    _figures: dict[str, Figure] = field(default_factory=dict)
    _runs: list[dict[str, Any]] = field(default_factory=list)

    def text(self, markdown: str) -> None:
        """Add a paragraph or a headline."""
        self._parts.append(markdown)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; all but its first column are numbers."""
        ruler = ["---", *["---:"] * (len(header) - 1)]
        self._parts.append("\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows)))

    def figure(self, name: str, figure: Figure, alt: str) -> None:
        """Add a picture; `alt` says what it shows to those who do not see it."""
        self._figures[name] = figure
        self._parts.append(f"![{alt}]({name}.png)")

    def keep(
        self, plans: Mapping[Key, Sequence[Run]], found: Mapping[Key, Sequence[Sequence[Measured]]]
    ) -> None:
        """Add runs with all that was measured to `results.json`."""
        for key, runs in plans.items():
            for run, history in zip(runs, found[key], strict=True):
                about = {"name": run.name, "recipe": repr(run.recipe), "seed": run.seed}
                self._runs.append({**about, "measured": history})

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write `report.md`, the pictures and `results.json`."""
        for name, figure in self._figures.items():
            figure.savefig(folder / f"{name}.png", dpi=130)
        about = {"settings": dict(settings), "versions": versions()}
        results = plain({**about, **self.results, "runs": self._runs})
        with replacing(folder / "results.json") as part:
            part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        made = ", ".join(
            f"{key} {value}" for key, value in (*settings.items(), *versions().items())
        )
        rough = [ROUGH] if settings.get("quick") else []
        parts = [f"# {self.title}", *rough, *self._parts, f"Made with {made}."]
        with replacing(folder / "report.md") as part:
            part.write_text("\n\n".join(parts) + "\n")


def versions() -> dict[str, str]:
    """The settings and versions that the numbers were made with."""
    return {
        "python": platform.python_version(),
        "pycoherence": pc.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }


def percent(values: Sequence[float]) -> str:
    """The mean of shares over the seeds and, of more than one, half their range."""
    return spread([100 * value for value in values], 1) + "%"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean over the seeds and, of more than one, half their range."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def late_shares(seeds: Sequence[Sequence[Measured]], key: str) -> str:
    """A share in the end, for a table."""
    if any(run[-1][key] is None for run in seeds):
        return "-"  # a share of nothing, with one seed at least
    return percent([late(run, key) for run in seeds])


def first_steps(seeds: Sequence[Sequence[Measured]], key: str, level: float) -> str:
    """The first step with a share, for a table."""
    found = [first(run, key, level) for run in seeds]
    return "never" if max(found) == float("inf") else spread(found, 0)
