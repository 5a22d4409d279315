"""The picture of the demo, drawn from its `coherence.json`."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

# Blue and vermilion are told apart with every kind of colour blindness.
COLOURS = {"real": "#0072b2", "random": "#d55e00"}
INK, GREY, PALE = "#222222", "#6b6b6b", "#dddddd"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a demo's result: its coherence over the steps, whole and by layer.

    Args:
        result: What `coherence.json` holds.
        path: Of the picture; the ending chooses the format.
    """
    network, *layers = result["runs"]["real"][0]["modules"]
    rows = ceil((len(layers) + 1) / 2)
    figure = Figure(figsize=(9, 4.6 + 2.3 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2, *[1] * rows])
    large = figure.add_subplot(grid[0, :])
    coherence_panel(large, result, network)
    explain(large, result)
    small = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(len(layers) + 1)]
    for axes, layer in zip(small, layers, strict=False):
        coherence_panel(axes, result, layer)
        axes.sharey(large)
        title(axes, f"{layer} layer" if layer == "output" else layer)
    accuracy_panel(small[-1], result)
    for axes in small[-2:]:
        axes.set_xlabel("training step")
    figure.savefig(path, dpi=160)


def coherence_panel(axes: Axes, result: Mapping[str, Any], part: str) -> None:
    """The m-coherence of one part of the network in both runs, and the orthogonal limit."""
    prepare(axes)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for kind, found in result["runs"].items():
        m = [at["modules"][part]["m"] for at in found]
        axes.plot(steps(found), m, color=COLOURS[kind], linewidth=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("m-coherence")


def explain(axes: Axes, result: Mapping[str, Any]) -> None:
    """Headline, the names of the curves, and the meaning of the orthogonal limit."""
    examples = result["settings"]["training_examples"]
    axes.set_title(
        "How many examples are helped by a step along the gradient of one?\n", loc="left",
        fontsize=14, fontweight="bold", color=INK,
    )
    axes.text(0, 1.03, f"m-coherence of all {examples} training examples, whole network",
              transform=axes.transAxes, color=GREY, fontsize=11)
    for kind, found in result["runs"].items():
        peak = max(found, key=lambda at: at["modules"]["network"]["m"])
        axes.annotate(
            f"{kind} labels", (peak["step"], peak["modules"]["network"]["m"]), (0, 8),
            textcoords="offset points", ha="center", color=COLOURS[kind], fontsize=12,
            fontweight="bold",
        )
    axes.annotate("m = 1: orthogonal gradients, each example helps itself alone", (0, 1), (4, 5),
                  textcoords="offset points", color=GREY, fontsize=10)
    axes.margins(y=0.12)
    axes.set_xlabel("training step")


def accuracy_panel(axes: Axes, result: Mapping[str, Any]) -> None:
    """Accuracy on the training labels, and on the true labels of the test set."""
    prepare(axes)
    for kind, found in result["runs"].items():
        for key, style in {"train_accuracy": "-", "test_accuracy": (0, (1.5, 1.5))}.items():
            values = [at[key] for at in found]
            axes.plot(steps(found), values, color=COLOURS[kind], linestyle=style, linewidth=2)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("accuracy")
    title(axes, "accuracy: training (solid), test (dotted)")


def prepare(axes: Axes) -> None:
    """Steps on a logarithmic axis that has room for step 0, and no ink without use."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=10)
    axes.margins(x=0.01)


def title(axes: Axes, text: str) -> None:
    """Name a small panel."""
    axes.set_title(text, loc="left", fontsize=11, color=INK)


def steps(found: list[dict[str, Any]]) -> list[int]:
    """When the measurements were made."""
    return [at["step"] for at in found]
