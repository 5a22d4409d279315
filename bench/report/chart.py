"""The picture of `docs/benchmarks.md`, drawn from what `bench training` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Blue and vermilion differ for every kind of colour vision, and in brightness too.
COLOURS = {"ours": "#0072b2", "rival": "#d55e00"}
INK, GREY, PALE = "#222222", "#666666", "#e2e2e2"
LABELS = {"ours": "pycoherence", "rival": "other libraries"}

Result = Mapping[str, Any]


def draw(result: Result, path: Path) -> None:
    """Write the picture: a panel for each model, a bar for each statistic and rival.

    Args:
        result: The output of `bench training`.
        path: The file to write; the ending chooses the format.
    """
    models = result["models"]
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(11, 5.4), layout=layout)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        ratios = [case["ratio"] for case in _compared(model) if _counts(case)]
        _prepare(axes, min(0.95, *ratios) * 0.97, max(1.5, *ratios))
        _bars(axes, model)
        title = f"{name}, batch of {model['batch']}"
        axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    compared = _compared(next(iter(models.values())))
    panels[0].set_yticks(_places(compared), [case["name"] for case in compared], color=INK)
    panels[0].invert_yaxis()
    threads = result["threads"]
    figure.suptitle(
        "Time of a forward and backward pass with per-example statistics", x=0.01, ha="left",
        fontsize=14, fontweight="bold", color=INK,
    )  # fmt: skip
    subtitle = (
        f"multiples of the same pass without any (dashed), {threads} threads; lower is better"
    )
    figure.supxlabel(subtitle, fontsize=10, color=GREY)
    _legend(figure)
    figure.savefig(path, dpi=160)


def _compared(model: Result) -> list[Result]:
    return [case for case in model["cases"] if case["kind"] != "plain"]


def _places(compared: list[Result]) -> list[float]:
    """The places of the bars, with a gap between ours and the rivals'."""
    return [at + 0.6 * (case["kind"] == "rival") for at, case in enumerate(compared)]


def _counts(case: Result) -> bool:
    return case.get("ratio") is not None


def _bars(axes: Axes, model: Result) -> None:
    label: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    compared = _compared(model)
    for at, case in zip(_places(compared), compared, strict=True):
        if not _counts(case):
            axes.annotate("not measured", (1, at), (5, 0), color=GREY, fontsize=9, **label)
            continue
        ratio, colour = case["ratio"], COLOURS[case["kind"]]
        # From 1, so that on the logarithmic axis the length is the cost of the statistic.
        axes.barh(at, ratio - 1, left=1, height=0.7, color=colour)
        text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
        axes.annotate(text, (max(ratio, 1), at), (5, 0), color=INK, fontsize=9.5, **label)
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))


def _prepare(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with room for the figures, and no ink without use."""
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.22)
    usual = (0.5, 1, 1.5, 2, 3, 5, 8) if high < 10 else (0.3, 1, 3, 10, 30, 100, 300)
    ticks = [tick for tick in usual if low <= tick <= high * 1.2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}x"))
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, length=0)


def _legend(figure: Figure) -> None:
    for at, (kind, label) in enumerate(LABELS.items()):
        figure.text(
            0.99 - 0.125 * (1 - at), 0.985, label, ha="right", va="top", fontsize=11,
            fontweight="bold", color=COLOURS[kind],
        )  # fmt: skip
