"""The picture of the demo, drawn from what its `coherence.json` holds."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from pycoherence.plot import BLUE, GREY, INK, VERMILION, bare

COLOURS = {"real": BLUE, "random": VERMILION}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture: m-coherence over the steps, of the network and each layer; accuracies.

    Args:
        result: The content of `coherence.json`.
        path: The file to write; the ending chooses the format.
    """
    runs = result["runs"]
    network, *layers = runs["real"][0]["modules"]
    rows = ceil((len(layers) + 1) / 2)
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    figure = Figure(figsize=(9, 4.8 + 2.2 * rows), layout=layout)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2.1, *[1] * rows])
    large = figure.add_subplot(grid[0, :])
    small = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(len(layers) + 1)]

    top = 1.1 * max(m for run in runs.values() for part in run[0]["modules"] for m in ms(run, part))
    for axes, part in zip([large, *small], [network, *layers], strict=False):
        draw_coherence(axes, runs, part, top)
        axes.set_title(f"m-coherence of {part}", loc="left", fontsize=11, color=INK)
    draw_accuracy(small[-1], runs)
    explain(large, runs, network, result["settings"]["training_examples"])
    for axes in (large, *small[-2:]):
        axes.set_xlabel("training step", color=GREY)
    figure.savefig(path, dpi=160)


def half_fitted(run: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the first measurement with half of the training labels right, if there is one."""
    return next((i for i, at in enumerate(run) if at["train_accuracy"] >= 0.5), None)


def ms(run: Sequence[Mapping[str, Any]], part: str) -> list[float]:
    """The m-coherence of one part of the network at each measurement."""
    return [at["modules"][part]["m"] for at in run]


def steps(run: Sequence[Mapping[str, Any]]) -> list[int]:
    """When the measurements were made."""
    return [at["step"] for at in run]


def draw_coherence(axes: Axes, runs: Mapping[str, Any], part: str, top: float) -> None:
    """The m-coherence of one part in both runs, and that of orthogonal gradients."""
    prepare(axes)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for kind, run in runs.items():
        axes.plot(steps(run), ms(run, part), color=COLOURS[kind], linewidth=2)
    axes.set_ylim(0, top)


def draw_accuracy(axes: Axes, runs: Mapping[str, Any]) -> None:
    """How well each run knows its own training labels, and the true labels of the test set."""
    prepare(axes)
    for kind, run in runs.items():
        for score, style in {"train_accuracy": "-", "test_accuracy": (0, (1.5, 1.5))}.items():
            values = [at[score] for at in run]
            axes.plot(steps(run), values, color=COLOURS[kind], linestyle=style, linewidth=2)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.05)
    title = "accuracy: training labels (solid), test set (dotted)"
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def explain(axes: Axes, runs: Mapping[str, Any], part: str, examples: int) -> None:
    """Headline, the names of the curves, and the points that are fair to compare."""
    question = "How many examples does a step along the gradient of one example help?"
    axes.set_title(f"{question}\n", loc="left", fontsize=14, fontweight="bold", color=INK)
    offset: dict[str, Any] = {"textcoords": "offset points"}
    axes.annotate(
        f"m-coherence of all {examples} training examples, over the whole {part}",
        (0, 1), (0, 8), xycoords="axes fraction", fontsize=11, color=GREY, **offset,
    )  # fmt: skip
    axes.annotate("m = 1: orthogonal gradients", (0, 1), (6, 4), color=GREY, **offset)
    for kind, run in runs.items():
        m, colour = ms(run, part), COLOURS[kind]
        peak, half = m.index(max(m)), half_fitted(run)
        at_peak = run[peak]["step"], m[peak]
        label: dict[str, Any] = {"ha": "left" if peak < len(m) / 2 else "right", "color": colour}
        name: dict[str, Any] = {"fontsize": 13, "fontweight": "bold"}
        axes.annotate(f"{kind} labels", at_peak, (0, 24), **name, **label, **offset)
        if half is not None:
            axes.plot(run[half]["step"], m[half], "o", markersize=7, color=colour)
            text = f"m = {m[half]:.1f} (dot) when half of them are fitted"
            axes.annotate(text, at_peak, (0, 8), **label, **offset)


def prepare(axes: Axes) -> None:
    """Steps on a logarithmic scale with room for step 0."""
    bare(axes)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
