"""Zhang et al. 2017, arXiv:1611.03530: networks fit random labels as well as true ones.

Ruined labels and images, regularisers, coherence, and the network of Theorem 1 that fits anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from matplotlib.ticker import PercentFormatter
from torch import nn

from pycoherence.plot import GREY
from pycoherence.studies import corrupt, finite_sample, plots
from pycoherence.studies.augment import Shift
from pycoherence.studies.data import Data
from pycoherence.studies.measures import Measured, accuracies, coherence, first, late, share
from pycoherence.studies.models import CNN, MLP
from pycoherence.studies.plots import BLUE, VERMILION
from pycoherence.studies.report import Report, first_steps, late_shares, percent, spread
from pycoherence.studies.runs import Run, train_each
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

NETWORKS = ("MLP", "CNN")
SAMPLE = 500
POINTS = 2000
FITTED = 0.99
"""Share of the labels that counts as all, as a single step can lose some again."""
DECAYS = {"weight decay 0.0005": 5e-4, "weight decay 0.005": 5e-3}


class Case(NamedTuple):
    """A network and its data; the noise is the probability that a label is drawn at random."""

    network: str = "MLP"
    images: str = "true"
    noise: float = 0.0
    regularizer: str = "none"


Found = Mapping[Case, list[list[Measured]]]
KINDS: dict[str, tuple[Case, str, str]] = {
    "true labels": (Case(), "#222222", "-"),
    "half of them random": (Case(noise=0.5), "#e69f00", "-"),
    "random labels": (Case(noise=1.0), "#d55e00", "-"),
    "shuffled pixels": (Case(images="shuffled"), "#56b4e9", "--"),
    "random pixels": (Case(images="random"), "#0072b2", "--"),
    "Gaussian images": (Case(images="Gaussian"), "#009e73", "--"),
}
"""The kinds of training data, and how they are drawn."""


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        examples: The most examples to train on.
        noise: Beside 0, 0.5 and 1.
    """

    widths: tuple[int, ...] = (512,)
    epochs: int = 220
    channels: tuple[int, ...] = (32, 64)
    cnn_epochs: int = 100
    noise: tuple[float, ...] = (0.2, 0.8)
    regularizers: tuple[str, ...] = ("none", *DECAYS, "dropout", "shifts", "all")
    examples: int = 100_000
    measurements: int = 60


QUICK = Scale((256,), 130, (8, 16), 30, (), ("none", "all"), 300, 15)


def study(settings: Settings) -> Report:
    """Train, draw and report."""
    scale = QUICK if settings.quick else Scale()
    data = settings.data.first(scale.examples)
    seeds = range(settings.seeds)
    plans = {case: [plan(case, scale, data, seed) for seed in seeds] for case in cases(scale)}
    found = train_each(plans, settings.runs)
    report = Report("Understanding deep learning requires rethinking generalization (Zhang 2017)")
    report.keep(plans, found)
    report.text(
        "Networks are trained on true labels, labels drawn at random and ruined images with the "
        "same settings ([Zhang et al. 2017](https://arxiv.org/abs/1611.03530)). Test images are "
        f"ruined like the others; test labels are true. Fitted means {FITTED:.0%}. Numbers are "
        "medians of the last tenth of the steps, as means of the seeds ± half their range."
    )
    report_kinds(report, found)
    report_noise(report, found, scale)
    report_regularizers(report, found, scale)
    report_finite_sample(report, data, settings.seeds)
    return report


def cases(scale: Scale) -> list[Case]:
    """All there is to train, each once."""
    kinds = [case for case, _, _ in KINDS.values()]
    every = [case._replace(network=network) for network in NETWORKS for case in kinds]
    every += [Case(noise=noise) for noise in scale.noise]
    every += [Case(noise=p, regularizer=by) for p in (0.0, 1.0) for by in scale.regularizers]
    return [*dict.fromkeys(every)]


def plan(case: Case, scale: Scale, data: Data, seed: int) -> Run:
    """One case with one seed."""
    name = f"{case.network}-{case.images}-{100 * case.noise:.0f}-{case.regularizer}-seed{seed}"
    return Run(
        name.replace(" ", ""), recipe(case, scale, data), ruined(case, data, seed), seed, measure
    )


def recipe(case: Case, scale: Scale, data: Data) -> Recipe:
    """How a case is trained: alike on all data, except for the regulariser that is its subject."""
    by = case.regularizer
    network, epochs, lr = CNN(scale.channels), scale.cnn_epochs, 0.1
    if case.network == "MLP":
        dropout = 0.5 if by in ("dropout", "all") else 0.0
        network, epochs, lr = MLP(scale.widths, dropout), scale.epochs, 0.01
    return Recipe(
        network,
        min(epochs * max(1, len(data.labels) // 100), 100_000),
        lr,
        momentum=0.9,
        weight_decay=5e-4 if by == "all" else DECAYS.get(by, 0.0),
        augment=Shift(1) if by in ("shifts", "all") else None,
        measurements=scale.measurements,
    )


def ruined(case: Case, data: Data, seed: int) -> Data:
    """The data of a case: labels of training, and images of training and test."""
    labels = corrupt.uniform_labels(data.truth, case.noise, data.classes, seed=seed)
    if case.images == "true":
        return data.labelled(labels)
    kinds = {"shuffled": corrupt.shuffled_pixels, "random": corrupt.random_pixels}
    ruin = kinds.get(case.images, corrupt.gaussian_images)
    # One permutation is for both sets; what each image draws for itself must differ between them.
    other = seed if case.images == "shuffled" else seed + 1000
    images, test_images = ruin(data.images, seed=seed), ruin(data.test_images, seed=other)
    return replace(data, images=images, labels=labels, test_images=test_images)


def measure(model: nn.Module, data: Data) -> Measured:
    """Accuracies, and the m-coherence of the first examples."""
    sample = data.first(SAMPLE)
    return {**accuracies(model, data), "m": coherence(model, sample.images, sample.labels).m}


def report_kinds(report: Report, found: Found) -> None:
    """How fast each kind of data is fitted, what is known of the test set then, and coherence."""
    report.text(
        "## True, random and ruined\n\nThe m-coherence m is that of the gradients of the first "
        f"{SAMPLE} training examples: how many of them the gradient of one helps, itself included."
    )
    labels, gradients = "Random labels and ruined images are fitted too", "How far gradients agree"
    for name, key, headline, what, scaled in (
        ("kinds", "train", labels, "labels fitted", plots.as_percent),
        ("coherence", "m", gradients, "m-coherence", plots.logarithmic),
    ):
        figure, panels = plots.panels(1, 2, headline)
        for network, axes in zip(NETWORKS, panels, strict=True):
            for kind, (case, colour, style) in KINDS.items():
                seeds = found[case._replace(network=network)]
                plots.curve(axes, seeds, key, colour, linestyle=style, label=kind)
            plots.title(axes, f"{network}: {what}")
            plots.over_steps(axes)
            scaled(axes)
        plots.legend(figure, panels[0])
        report.figure(name, figure, f"{what} over the steps by kind of data")
    rows = []
    for network in NETWORKS:
        for kind, (case, _, _) in KINDS.items():
            seeds = found[case._replace(network=network)]
            cells = [*fit_cells(seeds, found[Case(network)]), *m_cells(seeds)]
            shares = (late_shares(seeds, key) for key in ("train", "test"))
            rows.append([network, kind, *cells, *shares])
    head = ["network", "trained on", "half fitted at step", "fitted at step", "over true labels"]
    report.table([*head, "m before", "m at half", "largest m", "fitted in the end", "test"], rows)


def m_cells(seeds: list[list[Measured]]) -> list[str]:
    """The m-coherence before the first step, when half of the labels are fitted, and at most."""
    half = [next((at["m"] for at in run if at["train"] >= 0.5), None) for run in seeds]
    reached = [m for m in half if m is not None]
    start = spread([run[0]["m"] for run in seeds], 1)
    most = spread([max(at["m"] or 0 for at in run) for run in seeds], 1)
    return [start, spread(reached, 1) if len(reached) == len(half) else "never", most]


def fit_cells(seeds: list[list[Measured]], true: list[list[Measured]]) -> list[str]:
    """When half and all labels are fitted, and how many times as long as with true labels."""
    half, full = (first_steps(seeds, "train", level) for level in (0.5, FITTED))
    slow, fast = ([first(run, "train", FITTED) for run in runs] for runs in (seeds, true))
    over = [a / b for a, b in zip(slow, fast, strict=True) if b and a + b < float("inf")]
    return [half, full, spread(over, 1) if len(over) == len(fast) else "-"]


def report_noise(report: Report, found: Found, scale: Scale) -> None:
    """The test error and the time to fit, by the share of labels drawn at random."""
    report.text("## More and more random labels")
    noises = sorted({0.0, 0.5, 1.0, *scale.noise})
    seeds = [found[Case(noise=noise)] for noise in noises]
    ends = [[1 - late(run, "test") for run in runs] for runs in seeds]
    bests = [[1 - max(at["test"] for at in run) for run in runs] for runs in seeds]
    times = [[first(run, "train", FITTED) for run in runs] for runs in seeds]
    rows = []
    for noise, runs, end, best in zip(noises, seeds, ends, bests, strict=True):
        cells = [*fit_cells(runs, seeds[0]), late_shares(runs, "train"), percent(end)]
        rows.append([f"{noise:.0%}", late_shares(runs, "true"), *cells, percent(best)])
    figure, (errors, steps) = plots.panels(1, 2, "From true to random labels (MLP)")
    for axes, values, colour, name in (
        (errors, ends, VERMILION, "in the end"),
        (errors, bests, BLUE, "at its least"),
        (steps, times, VERMILION, None),
    ):
        plots.line(axes, noises, [*zip(*values, strict=True)], colour, label=name, marker="o")
        axes.set_xlabel("labels drawn at random", color=GREY)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    plots.title(errors, "test error")
    plots.as_percent(errors)
    errors.legend(frameon=False, labelcolor="linecolor", loc="upper left")
    plots.title(steps, f"steps until {FITTED:.0%} of the labels are fitted")
    steps.set_ylim(bottom=0)
    report.figure("noise", figure, "Test error and time to fit by the share of random labels")
    head = ["random", "true", "half fitted at step", "fitted at step", "over true labels"]
    report.table([*head, "fitted in the end", "test error", "least test error"], rows)


def report_regularizers(report: Report, found: Found, scale: Scale) -> None:
    """The effect of regularisers, for true and for random labels."""
    report.text(
        "## Regularisers\n\nDropout leaves out half of the hidden units; shifts move each image by "
        "up to one pixel each time; all is both and a weight decay of 0.0005."
    )
    figure, (test, fitted) = plots.panels(1, 2, "With and without regularisers (MLP)")
    rows = []
    for i, (shade, by) in enumerate(zip(plots.SHADES, scale.regularizers, strict=False)):
        true, noisy = (found[Case(noise=noise, regularizer=by)] for noise in (0.0, 1.0))
        test.plot([late(run, "test") for run in true], [-i] * len(true), "o", color=shade)
        plots.curve(fitted, noisy, "train", shade, label=by, linestyle=("-", "--")[i % 2])
        cells = [late_shares(runs, key) for runs in (true, noisy) for key in ("train", "test")]
        rows.append([by, *cells, first_steps(noisy, "train", FITTED)])
    test.set_yticks([])
    test.margins(0.1)
    test.set_xlabel("test accuracy of each seed", color=GREY)
    test.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    plots.title(test, "trained on true labels")
    plots.title(fitted, "random labels fitted")
    plots.over_steps(fitted)
    plots.as_percent(fitted)
    plots.legend(figure, fitted)
    report.figure("regularizers", figure, "Test accuracy and random labels fitted by regulariser")
    head = ["regulariser", "true labels: fitted", "test", "random labels: fitted", "test"]
    report.table([*head, "fitted at step"], rows)


def report_finite_sample(report: Report, data: Data, seeds: int) -> None:
    """The network of Theorem 1 on true labels, random labels and random numbers."""
    report.text(
        "## A network that fits anything\n\nTwo layers of ReLU with 2n + d weights, computed and "
        "not trained (`pycoherence.studies.finite_sample`). A class is the number the output is "
        "nearest to; the error is the largest of all points and seeds, in float64."
    )
    rows, parts = [], []
    for name in ("true labels", "random labels", "normal numbers"):
        try:
            about = [constructed(name, data.first(POINTS), seed) for seed in range(seeds)]
        except ValueError as error:
            report.text(f"Not for {name}: {error}.")
            continue
        right, test = (percent([part[key] for part in about]) for key in ("right", "test"))
        size = (str(about[0][key]) for key in ("points", "weights"))
        rows.append([name, *size, right, f"{max(part['error'] for part in about):.0e}", test])
        parts += about
    report.results["finite_sample"] = parts
    head = ["targets", "points n", "weights 2n + d", "within half a class", "largest error"]
    report.table([*head, "test labels right"], rows)


@torch.no_grad()
def constructed(name: str, data: Data, seed: int) -> Measured:
    """How well the network of Theorem 1 does on one kind of targets."""
    noise = torch.Generator().manual_seed(seed)
    targets = {
        "true labels": data.truth,
        "random labels": corrupt.uniform_labels(data.truth, 1.0, data.classes, seed=seed),
        "normal numbers": torch.randn(len(data.truth), generator=noise).to(data.truth.device),
    }[name]
    network = finite_sample.fit(data.images, targets, seed=seed)
    error = (network(data.images) - targets).abs()
    on_test = network(data.test_images).round() == data.test_labels
    weights = sum(p.numel() for p in network.parameters())
    about = {"targets": name, "seed": seed, "points": len(network.b), "weights": weights}
    shares = {"right": share(error < 0.5), "test": share(on_test)}
    return {**about, **shares, "error": error.max().item()}
