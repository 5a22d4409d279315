"""Chatterjee, Zielinski 2020, 2022, arXiv:2008.01217, arXiv:2203.10036: how gradients agree.

How far examples agree while they are learned, with true and with random labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pycoherence.plot import GREY
from pycoherence.studies import coherences, courses, plots
from pycoherence.studies.corrupt import uniform_labels
from pycoherence.studies.measures import Measured, late, spearman
from pycoherence.studies.models import MLP, Network, ResNet
from pycoherence.studies.plots import BLUE, VERMILION
from pycoherence.studies.report import Report, first_steps, late_shares, percent, spread
from pycoherence.studies.runs import Run, train_each
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

LR, MOMENTUM = 0.05, 0.9
PARTS = {"first": BLUE, "middle": "#009e73", "last": VERMILION}

Found = Mapping[tuple[str, float], list[list[Measured]]]
"""The measurements with each seed, by network and share of random labels."""


@dataclass(frozen=True)
class Scale:
    """How much is trained; `examples` is how many are used at most."""

    noise: tuple[float, ...] = (0.0, 0.5, 1.0)
    widths: tuple[int, ...] = (256, 256)
    channels: tuple[int, ...] = (8, 16, 32)
    epochs: int = 60
    measurements: int = 32
    examples: int = 1_000_000


QUICK = Scale((0.0, 1.0), (64, 64), (8, 16), 14, 8, 700)


def study(settings: Settings) -> Report:
    """Train, draw and report."""
    scale = QUICK if settings.quick else Scale()
    settings = replace(settings, data=settings.data.first(scale.examples))
    report = Report("The generalization mystery (Chatterjee and Zielinski 2022)")
    plans = plan(settings, scale)
    found = train_each(plans, settings.runs)
    report.keep(plans, found)
    n = len(settings.data.labels)
    sample, size = min(n, coherences.SAMPLE), coherences.batch_size(settings.data)
    report.text(
        f"m-coherence M = ‖Σ g‖² / Σ ‖g‖² of the gradients of {sample} training examples: how many "
        "of them a step for one helps, 1 if they are orthogonal (Chatterjee and Zielinski "
        "[2020](https://arxiv.org/abs/2008.01217), [2022](https://arxiv.org/abs/2203.10036)). It "
        "grows with the sample. In the BatchNorm network it is inferred from mini-batches. Numbers "
        "are means of the seeds ± half their range; bands around M have the 95% intervals of all "
        "seeds, by the jackknife."
    )
    report_course(report, found)
    report_layers(report, found)
    report_estimates(report, found, size, sample)
    report_stopping(report, found)
    report_gap(report, found, sample, n)
    return report


def plan(settings: Settings, scale: Scale) -> dict[tuple[str, float], list[Run]]:
    """Every network with every share of random labels and each seed."""
    networks: dict[str, Network] = {
        "MLP": MLP(scale.widths),
        "ResNet": ResNet(scale.channels),
        "BatchNorm ResNet": ResNet(scale.channels, "batch"),
    }
    plans, data, size = {}, settings.data, coherences.batch_size(settings.data)
    steps, count = scale.epochs * (len(data.labels) // size), scale.measurements
    for name, network in networks.items():
        mixed = name.startswith("BatchNorm")
        measure = coherences.measure_batches if mixed else coherences.measure_examples
        recipe = Recipe(network, steps, LR, size, momentum=MOMENTUM, measurements=count)
        for noise in scale.noise:
            runs = plans[name, noise] = []
            for seed in range(settings.seeds):
                labels = uniform_labels(data.truth, noise, data.classes, seed=seed)
                about = f"{name.lower().replace(' ', '-')}-{100 * noise:.0f}-seed{seed}"
                runs.append(Run(about, recipe, data.labelled(labels), seed, measure))
    return plans


def kind(noise: float) -> str:
    """The name of labels with so much noise."""
    return {0.0: "true", 1.0: "random"}.get(noise, f"{noise:.0%} random")


def shade(noise: float) -> str:
    """Their colour."""
    return plots.SHADES[round(4 * noise)]


def columns(found: Found) -> list[tuple[str, dict[float, list[list[Measured]]]]]:
    """The networks, each with what was found for its labels."""
    names = dict.fromkeys(name for name, _ in found)
    return [(name, {z: seeds for (n, z), seeds in found.items() if n == name}) for name in names]


def report_course(report: Report, found: Found) -> None:
    """Coherence over the steps, beside what is learned."""
    report.text("## Coherence while labels are learned")
    nets = columns(found)
    figure, axes = plots.panels(2, len(nets), "Coherence while labels are learned")
    rows = []
    for i, (name, labels) in enumerate(nets):
        above, below = axes[i], axes[i + len(nets)]
        for noise, seeds in labels.items():
            look = {"colour": shade(noise), "label": f"{kind(noise)} labels"}
            plots.coherence_curve(above, seeds, "whole", **look)
            plots.curve(below, seeds, "train", shade(noise))
            rows.append([name, kind(noise), *course_row(seeds)])
        plots.title(above, name)
        plots.over_steps(below)
        plots.as_percent(below)
    plots.as_coherence(axes[: len(nets)])
    axes[len(nets)].set_ylabel("given labels fitted", color=GREY)
    plots.legend(figure, axes[0])
    report.figure("coherence", figure, "m-coherence and labels fitted over the steps")
    head = ["network", "labels", "M at first", "trough", "at step", "peak", "at step"]
    head += ["fitted then", "M in the end", "below 1 then", "half fitted at step"]
    report.table(head, rows)


def course_row(seeds: Sequence[Sequence[Measured]]) -> list[str]:
    """The coherence at its start, its minimum, its maximum after that, and its end."""
    rises = [courses.rise(run) for run in seeds]
    turns = [[run[ends[i]] for run, ends in zip(seeds, rises, strict=True)] for i in (0, 1)]
    cells = [spread([run[0]["whole"] for run in seeds])]
    for ends in turns:
        cells += [spread([at["whole"] for at in ends]), spread([at["step"] for at in ends], 0)]
    last = [[at for at in run if at["step"] > 0.9 * run[-1]["step"]] for run in seeds]
    below = [sum(at["whole high"] < 1 for at in run) / len(run) for run in last]
    cells.append(percent([at["train"] for at in turns[1]]))
    end = spread([late(run, "whole") for run in seeds])
    return [*cells, end, percent(below), first_steps(seeds, "train", 0.5)]


def report_layers(report: Report, found: Found) -> None:
    """The same for single layers."""
    report.text("## Layers\n\nThe weights of the first, a middle and the last layer.")
    nets = columns(found)
    figure, axes = plots.panels(2, len(nets), "Coherence of single layers")
    rows = []
    for i, (name, labels) in enumerate(nets):
        for noise, seeds in labels.items():
            early = [spread([courses.until(run, 0.5, part) for run in seeds]) for part in PARTS]
            end = [spread([late(run, part) for run in seeds]) for part in PARTS]
            rows.append([name, kind(noise), *early, *end])
        for j, noise in enumerate((min(labels), max(labels))):
            panel = axes[i + j * len(nets)]
            for part, colour in PARTS.items():
                plots.coherence_curve(panel, labels[noise], part, colour, label=f"{part} layer")
            plots.title(panel, f"{name}, {kind(noise)} labels")
    for row in (axes[: len(nets)], axes[len(nets) :]):
        plots.as_coherence(row)
    plots.legend(figure, axes[0])
    report.figure("layers", figure, "m-coherence of the first, a middle and the last layer")
    report.text("M, the mean over the steps until half of the labels are fitted, and in the end:")
    ends = [f"{part}, end" for part in PARTS]
    report.table(["network", "labels", *PARTS, *ends], rows)


def report_estimates(report: Report, found: Found, size: int, n: int) -> None:
    """The answers of mini-batches and subsamples instead."""
    sizes, rows, means = [size * batches for batches in coherences.SUBSAMPLES], [], []
    for (name, noise), seeds in found.items():
        every = [at for run in seeds for at in run]
        if "whole inverted" not in every[0]:
            continue  # there are no examples to compare with
        rows.append([name, kind(noise), *(inverted(every, part) for part in ("whole", *PARTS))])
        m, cells = np.mean([at["whole"] for at in every]), [name, kind(noise)]
        for what, of_all in {"plain": m / n, "free": (m - 1) / (n - 1)}.items():
            fewer = [np.mean([at[f"{what} {k}"] for at in every]) for k in sizes]
            cells += [f"{1000 * alpha:.2f}" for alpha in (*fewer, of_all)]
        means.append(cells)
    report.text(
        f"## From mini-batches, and from fewer examples\n\nM inferred from mini-batches of {size}, "
        "over M of the examples, at all measurements of all trainings: median, and from the 5th to "
        "the 95th percentile."
    )
    report.table(["network", "labels", "whole", *PARTS], rows)
    report.text(
        "A thousand times alpha from fewer examples, as the mean of all measurements: alpha as the "
        "papers have it, M / n, and without the diagonal, (M - 1) / (n - 1)."
    )
    head = [f"{what}, n = {k}" for what in ("plain", "free") for k in (*sizes, n)]
    report.table(["network", "labels", *head], means)


def inverted(every: list[Measured], part: str) -> str:
    """How far M from mini-batches is from that of examples."""
    ratios = [at[f"{part} inverted"] / at[part] for at in every]
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def report_stopping(report: Report, found: Found) -> None:
    """Test accuracy where coherence says to stop."""
    report.text(
        "## When to stop\n\nTest accuracy at its best, in the end, at the peak of coherence (where "
        "its largest rise ends), at the first measurement whose 95% interval of M reaches down to "
        "1, and at the first such after the peak."
    )
    noises, nets = sorted({noise for _, noise in found}), columns(found)
    shown = noises[len(noises) // 2]
    figure, axes = plots.panels(1, len(nets), f"When to stop, with {kind(shown)} labels")
    for panel, (name, labels) in zip(axes, nets, strict=True):
        draw_stops(panel, labels[shown])
        plots.title(panel, name)
    plots.legend(figure, axes[0])
    report.figure("stopping", figure, "m-coherence and test accuracy over the steps")
    rows = [[name, kind(noise), *stop_row(seeds)] for (name, noise), seeds in found.items()]
    head = ["network", "labels", "best", "end", "peak", "M first about 1", "at step"]
    report.table([*head, "after the peak", "at step"], rows)


def draw_stops(axes: Axes, seeds: list[list[Measured]]) -> None:
    """Coherence and test accuracy, with where to stop."""
    runs = [[{**at, "m": at["whole"] / courses.peak(run)["whole"]} for at in run] for run in seeds]
    plots.curve(axes, runs, "m", GREY, label="M, share of its peak", linewidth=1.5)
    plots.curve(axes, runs, "test", BLUE, label="test accuracy")
    for mark, name, stop in (
        ("^", "peak of M", courses.peak),
        ("o", "M first about 1", courses.flat),
    ):
        at = [stop(run) for run in seeds]
        place = [each["step"] for each in at], [each["test"] for each in at]
        axes.scatter(*place, marker=mark, color=VERMILION, zorder=3, label=name)
    plots.over_steps(axes)
    plots.as_percent(axes)


def stop_row(seeds: list[list[Measured]]) -> list[str]:
    """Test accuracies, by when to stop."""
    best = percent([max(at["test"] for at in run) for run in seeds])
    cells = [
        best,
        late_shares(seeds, "test"),
        percent([courses.peak(run)["test"] for run in seeds]),
    ]
    after = [courses.flat(run, courses.rise(run)[1]) for run in seeds]
    for ends in ([courses.flat(run) for run in seeds], after):
        cells += [percent([at["test"] for at in ends]), spread([at["step"] for at in ends], 0)]
    return cells


def report_gap(report: Report, found: Found, sample: int, n: int) -> None:
    """Coherence and the sum of the bound, against how badly was generalised."""
    lr = LR / (1 - MOMENTUM)
    report.text(
        "## The gap\n\nThe gap is training less test accuracy in the end. M is the mean over the "
        "steps until half of the labels are fitted. The sum is that of the bound on the gap of the "
        f"loss, with L = 1, no smoothness and steps of lr / (1 - momentum) = {lr:.2g}: a "
        "diagnostic, whose value bounds nothing. It is over all steps, or until 99% of the labels "
        "are fitted."
    )
    measures: dict[str, Callable[[list[Measured]], float]] = {
        "M until half fitted": lambda run: courses.until(run, 0.5),
        "sum, all steps": lambda run: courses.bound_sum(run, sample, n, lr),
        "sum, until fitted": lambda run: courses.bound_sum(run, sample, n, lr, 0.99),
    }
    gaps = {key: [late(r, "train") - late(r, "test") for r in runs] for key, runs in found.items()}
    names = [name for name, _ in columns(found)]
    figure, axes = plots.panels(1, len(measures), "What coherence says about the gap")
    rows = [[name, kind(noise), percent(gap)] for (name, noise), gap in gaps.items()]
    ranks = [[name] for name in [*names, "all"]]
    for panel, (title, measure) in zip(axes, measures.items(), strict=True):
        said = {key: [measure(run) for run in runs] for key, runs in found.items()}
        for row, ((name, noise), x) in zip(rows, said.items(), strict=True):
            row.append(spread(x, 1 if title[0] == "M" else 4))
            label, mark = f"{name}, {kind(noise)}", "os^"[names.index(name)]
            panel.scatter(x, gaps[name, noise], marker=mark, color=shade(noise), label=label)
        for row in ranks:
            keys = [key for key in found if row[0] in (key[0], "all")]
            pair = [[v for key in keys for v in of[key]] for of in (said, gaps)]
            row.append(f"{spearman(*torch.tensor(pair, dtype=torch.float64)):.2f}")
        plots.title(panel, title)
        panel.set_xlabel("m-coherence" if title[0] == "M" else "sum, with L = 1", color=GREY)
        panel.margins(0.08)
        panel.locator_params(axis="x", nbins=3)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].set_ylabel("training less test accuracy", color=GREY)
    plots.legend(figure, axes[0])
    report.figure("gap", figure, "The generalisation gap by coherence and by the sum of the bound")
    report.table(["network", "labels", "gap", *measures], rows)
    report.text("Rank correlation with the gap, over all trainings:")
    report.table(["of", *measures], ranks)
