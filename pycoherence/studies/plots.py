"""Pieces of the studies' pictures: curves over the steps, one band for all seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogFormatter, PercentFormatter

from pycoherence.plot import GREY, INK, bare
from pycoherence.studies.measures import Measured, late

SHADES = ("#440154", "#3b528b", "#21918c", "#5ec962", "#e8b500", "#d55e00")
"""From dark to bright, for what has an order."""


BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
"""For two or three that have none; also to those who do not see colours."""

LEAST_COHERENCE = 0.1
"""The ends of logarithmic axes of m-coherence."""


def panels(rows: int, columns: int, headline: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row."""
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    size = 3.2 * columns + 1.4, 2.9 * rows + 0.5  # with room for the legend
    figure = Figure(figsize=size, layout=layout)
    figure.suptitle(headline, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for each in axes:
        bare(each)
    return figure, axes


def title(axes: Axes, text: str) -> None:
    """Say what a panel shows."""
    axes.set_title(text, loc="left", fontsize=11, color=INK)


def over_steps(axes: Axes) -> None:
    """Steps on a logarithmic scale with room for step 0."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    axes.set_xlabel("training step", color=GREY)


def as_percent(axes: Axes) -> None:
    """Shares from nothing to all."""
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def logarithmic(axes: Axes) -> None:
    """Values of several orders of magnitude, written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(_WrittenOut())
    axes.tick_params(axis="y", which="minor", colors=GREY)


class _WrittenOut(LogFormatter):
    """Between powers of ten, where there are too few of them: 1.2 and not 1.2 x 10^0."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of a value, or none."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def curve(
    axes: Axes, seeds: Sequence[Sequence[Measured]], key: str, colour: str, **look: Any
) -> None:
    """The mean of the seeds over the steps, and from their least to their largest."""
    shown = apart(seeds[0])
    values = [[run[i][key] for i in shown] for run in seeds]
    line(axes, [seeds[0][i]["step"] for i in shown], values, colour, **look)


def apart(history: Sequence[Measured]) -> list[int]:
    """Indices of measurements that are not one on top of another on a logarithmic axis."""
    shown, last = [], -1.0
    for i, at in enumerate(history):
        if at["step"] > 1.05 * last:
            shown.append(i)
            last = at["step"]
    return shown


def coherence_curve(
    axes: Axes, seeds: Sequence[Sequence[Measured]], key: str, colour: str, **look: Any
) -> None:
    """m-coherence over the steps, its mean over the seeds; the band spans all their intervals."""
    shown = apart(seeds[0])
    at = [seeds[0][i]["step"] for i in shown]
    ends = [[run[i][f"{key} {end}"] for i in shown] for run in seeds for end in ("low", "high")]
    bottom = np.maximum(np.array(ends, dtype=float), LEAST_COHERENCE)  # there is no log of less
    line(axes, at, bottom.tolist(), colour, linewidth=0)
    values = np.array([[run[i][key] for i in shown] for run in seeds], dtype=float)
    axes.plot(at, values.mean(axis=0), **{"color": colour, "linewidth": 2, **look})


def as_coherence(panels: Sequence[Axes]) -> None:
    """m-coherence over the steps, on one logarithmic scale, with the orthogonal limit."""
    for axes in panels:
        over_steps(axes)
        logarithmic(axes)
        axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    panels[0].set_ylabel("m-coherence", color=GREY)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(LEAST_COHERENCE, top)


def line(
    axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], colour: str, **look: Any
) -> None:
    """The same for any values, one row for each seed."""
    values = np.array(seeds, dtype=float)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    axes.plot(x, values.mean(axis=0), **{"color": colour, "linewidth": 2, **look})


def bars(
    axes: Axes,
    found: Mapping[str, Sequence[Sequence[Measured]]],
    keys: Sequence[str],
    colours: Mapping[str, str],
) -> None:
    """Late shares side by side: a group for each key, and in it a bar for each of what was found.

    The line on a bar goes from the least seed to the largest.
    """
    width = 0.8 / len(found)
    for i, (name, seeds) in enumerate(found.items()):
        for j, key in enumerate(keys):
            values = [late(run, key) for run in seeds]
            x, mean = j + (i - (len(found) - 1) / 2) * width, sum(values) / len(values)
            axes.bar(x, mean, 0.9 * width, color=colours[name], zorder=2)
            axes.plot([x, x], [min(values), max(values)], color=INK, linewidth=1, zorder=3)
    axes.set_xticks(range(len(keys)), keys)
    as_percent(axes)


def legend(figure: Figure, *panels: Axes) -> None:
    """The names of the curves of these panels in their colours, beside all panels."""
    look: dict[str, Any] = {"frameon": False, "labelcolor": "linecolor", "handlelength": 1.2}
    names = [axes.get_legend_handles_labels() for axes in panels]
    curves = [curve for each in names for curve in zip(*each, strict=True)]
    figure.legend(*zip(*curves, strict=True), loc="outside right upper", **look)
