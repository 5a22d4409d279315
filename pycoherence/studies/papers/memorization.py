"""Badger 2022, arXiv:2211.09639: training that is pushed to memorise.

Each step lowers the loss on the training set and raises it on test examples; noise makes it easier.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch import nn

from pycoherence.plot import GREY
from pycoherence.studies import plots
from pycoherence.studies.corrupt import blended_images
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import Gradient, Mean, Splitting, attacked, held_out
from pycoherence.studies.measures import (
    Measured,
    coherence,
    halves,
    input_gradients,
    late,
    loss_changes,
    share,
)
from pycoherence.studies.models import CNN, MLP, Network, Softmax
from pycoherence.studies.plots import BLUE, GREEN, VERMILION
from pycoherence.studies.report import Report, late_shares, spread
from pycoherence.studies.runs import Run, train_each
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

SAMPLE = 200
INPUT_NOISE = 0.1

Key = tuple[str, str, float]
"""Part of the study; network, gradient or images; share."""
Found = Mapping[Key, list[list[Measured]]]
"""The measurements with each seed."""

HALVES = {"train": ("training", BLUE), "attacked": ("attacked", VERMILION)}
HALVES["held_out"] = ("held-out", GREEN)
WAYS = {"ordinary": "ordinary", "splitting": "splitting", "conditional": "splitting, conditional"}
WAYS["recovery"] = "splitting, then ordinary"


@dataclass(frozen=True)
class Scale:
    """How much is trained: long on the images as they are, shorter with noise and on parts.

    Attributes:
        sizes: Shares of the training set.
    """

    channels: tuple[int, ...] = (16, 32)
    widths: tuple[int, ...] = (256, 256)
    epochs: int = 150
    noise: tuple[float, ...] = (0.0, 0.5, 0.8, 0.95, 1.0)
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    sweep_epochs: int = 60
    measurements: int = 20


QUICK = Scale((8, 16), (64,), 24, (0.0, 1.0), (0.25, 1.0), 12, 5)


def study(settings: Settings) -> Report:
    """Train, draw and report."""
    scale = QUICK if settings.quick else Scale()
    report = Report("Memorisation by splitting (Badger 2022)")
    plans = plan_ways(settings, scale) | plan_sweeps(settings, scale)
    found = train_each(plans, settings.runs)
    report.keep(plans, found)
    report.text(
        "Splitting steps along the gradient of the loss on a batch of the training set less that "
        "on a batch of test examples, which are attacked that way "
        "([Badger 2022](https://arxiv.org/abs/2211.09639)); the other half of the test set is held "
        "out. Networks end in a softmax that is followed by cross-entropy, so that losses are "
        "bounded, in ordinary training too. Numbers are medians of the last tenth of the steps, as "
        "means of the seeds ± half their range; bands go from the least seed to the largest."
    )
    report_ways(report, found)
    report_sweeps(report, found)
    report_stability(report, found)
    return report


def plan_ways(settings: Settings, scale: Scale) -> dict[Key, list[Run]]:
    """Ordinary training and the kinds of splitting, on the images as they are."""
    count = steps(settings.data, scale.epochs)
    cnn, mlp = CNN(scale.channels, pooled=False), MLP(scale.widths)
    recipes = {
        ("CNN", "ordinary"): recipe(cnn, count),
        ("CNN", "splitting"): recipe(cnn, count, Splitting()),
        # A twentieth of the rate, as in the paper.
        ("CNN", "conditional"): recipe(cnn, count, Splitting(conditional=True), lr=5e-5),
        ("CNN", "recovery"): replace(recipe(cnn, count, Splitting()), switch=(count // 2, Mean())),
        ("MLP", "ordinary"): recipe(mlp, count),
        ("MLP", "splitting"): recipe(mlp, count, Splitting()),
    }
    recipes = {key: replace(each, measurements=scale.measurements) for key, each in recipes.items()}
    return {
        (network, way, 0.0): [
            Run(f"{way}-{network}-seed{seed}", each, settings.data, seed, measure)
            for seed in range(settings.seeds)
        ]
        for (network, way), each in recipes.items()
    }


def plan_sweeps(settings: Settings, scale: Scale) -> dict[Key, list[Run]]:
    """Images with noise, by splitting and ordinary; parts of the training set, by splitting."""
    count = steps(settings.data, scale.sweep_epochs)
    cnn = CNN(scale.channels, pooled=False)
    split, ordinary = recipe(cnn, count, Splitting()), recipe(cnn, count)
    plans: dict[Key, list[Run]] = {}
    for noise in scale.noise:
        for way, each in (("splitting", split), ("ordinary", ordinary)):
            plans["noise", way, noise] = plan(settings, each, way, noise)
    for size in scale.sizes:
        for images, noise in (("natural", 0.0), ("random", 1.0)):
            plans["size", images, size] = plan(settings, split, "splitting", noise, size)
    return plans


def plan(settings: Settings, each: Recipe, way: str, noise: float, size: float = 1.0) -> list[Run]:
    """One recipe with each seed, on a part of the training set blended with noise."""
    runs, n = [], max(1, round(size * len(settings.data.labels)))
    for seed in range(settings.seeds):
        data = blended(settings.data, noise, seed).first(n)
        name = f"{way}-noise{100 * noise:.0f}-{n}-seed{seed}"
        runs.append(Run(name, each, data, seed, halves))
    return runs


def recipe(
    network: Network, count: int, gradient: Gradient | None = None, lr: float = 1e-3
) -> Recipe:
    """Adam, for a network that ends in a softmax; hardly measured but at the end."""
    gradient = gradient or Mean()
    return Recipe(Softmax(network), count, lr, gradient=gradient, optimizer="Adam", measurements=5)


def steps(data: Data, epochs: int) -> int:
    """The number of steps, of batches of 100; no more than in the paper."""
    return min(epochs * max(1, len(data.labels) // 100), 100_000)


def blended(data: Data, noise: float, seed: int) -> Data:
    """The same with noise in all images, those of the test set too."""
    images = blended_images(torch.cat([data.images, data.test_images]), noise, seed=seed)
    n = len(data.images)
    return replace(data, images=images[:n], test_images=images[n:])


def measure(model: nn.Module, data: Data) -> Measured:
    """Accuracies, how much losses depend on the images, and m-coherence, each of a fixed sample.

    `m_both` is the m-coherence of training and attacked examples together, half of each.
    """
    images, labels = train = data.images[:SAMPLE], data.labels[:SAMPLE]
    found = halves(model, data)
    for name, (x, y) in {"train": train, "held_out": held_out(data)}.items():
        x, y = x[:SAMPLE], y[:SAMPLE]
        found[f"gradient_{name}"] = share(input_gradients(model, x, y))
        found[f"change_{name}"] = share(loss_changes(model, x, y, INPUT_NOISE))
    others, their = attacked(data)
    half = min(SAMPLE, len(labels), len(their)) // 2
    both = torch.cat([images[:half], others[:half]]), torch.cat([labels[:half], their[:half]])
    found["m_train"] = coherence(model, images[: 2 * half], labels[: 2 * half]).m
    found["m_both"] = coherence(model, *both).m
    return found


def report_ways(report: Report, found: Found) -> None:
    """How well each way of training learns what it is given, and what it is not."""
    report.text(
        "## Splitting\n\nConditional: only while test examples are right more often than "
        "by chance, at a twentieth of the learning rate. The last way splits for half of the steps."
    )
    figure, panels = plots.panels(2, 2, "Training against the test set")
    for axes, (way, name) in zip(panels, WAYS.items(), strict=True):
        seeds = found["CNN", way, 0.0]
        for key, (label, colour) in HALVES.items():
            plots.curve(axes, seeds, key, colour, label=label)
        plots.title(axes, name)
        plots.over_steps(axes)
        plots.as_percent(axes)
        axes.set_ylabel("accuracy", color=GREY)
    middle = found["CNN", "recovery", 0.0][0][-1]["step"] // 2
    panels[-1].axvline(middle, color=GREY, linewidth=1, linestyle="--", label="ordinary from here")
    plots.legend(figure, panels[-1])
    report.figure("splitting", figure, "Accuracies over the steps for four ways of training")
    rows = [
        [f"{network}, {WAYS[way]}", *(late_shares(seeds, key) for key in HALVES)]
        for (network, way, _), seeds in found.items()
        if network in ("CNN", "MLP")
    ]
    report.table(["network and training", *(name for name, _ in HALVES.values())], rows)


def report_sweeps(report: Report, found: Found) -> None:
    """The accuracies of splitting and ordinary training with noise and on parts of the data."""
    report.text(
        "## Noise and size\n\nThe CNN, with fewer steps, the same for all. A noise of "
        "100% leaves nothing of the images."
    )
    figure, panels = plots.panels(1, 3, "What can be memorised against the test set")
    for axes, way in zip(panels[:2], ("splitting", "ordinary"), strict=True):
        for key, (label, colour) in HALVES.items():
            sweep(axes, found, ("noise", way), key, colour, label)
        plots.title(axes, f"{way}, by noise")
        axes.set_xlabel("noise in the images", color=GREY)
        axes.set_ylabel("accuracy", color=GREY)
    for images, colour in (("natural", plots.SHADES[0]), ("random", plots.SHADES[4])):
        sweep(panels[2], found, ("size", images), "train", colour, f"training, {images} images")
    plots.title(panels[2], "splitting, by size")
    panels[2].set_xlabel("share of the training set", color=GREY)
    panels[2].set_ylabel("accuracy", color=GREY)
    plots.legend(figure, *panels[1:])
    report.figure("sweeps", figure, "Accuracies by share of noise and by size of the training set")
    for part, first in (
        ("noise", "training, noise"),
        ("size", "images, share of the training set"),
    ):
        rows = [
            [f"{kind}, {100 * level:g}%", *(late_shares(seeds, key) for key in HALVES)]
            for (of, kind, level), seeds in found.items()
            if of == part
        ]
        report.table([first, *(name for name, _ in HALVES.values())], rows)


def sweep(
    axes: Axes, found: Found, part: tuple[str, str], key: str, colour: str, label: str
) -> None:
    """A line of accuracies in the end, by noise or size."""
    levels = {level: seeds for (*of, level), seeds in found.items() if tuple(of) == part}
    ends = [[late(run, key) for run in seeds] for seeds in levels.values()]
    values = list(zip(*ends, strict=True))
    plots.line(axes, [*levels], values, colour, label=label, marker="o", markersize=4)
    plots.as_percent(axes)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def report_stability(report: Report, found: Found) -> None:
    """How much the loss depends on the images, and how well gradients agree."""
    report.text(
        f"## Stability to the images\n\nMeans over up to {SAMPLE} examples: the norm of the "
        "gradient of an example's loss with respect to its image, and how far its loss moves when "
        f"normal noise of {INPUT_NOISE} standard deviations is added to it; m-coherence of "
        "training examples, and of as many, half of them attacked."
    )
    figure, panels = plots.panels(2, 2, "How much the loss depends on the images")
    names = ("gradient", "change", "m_train", "m_both")
    titles = ("norm of the input gradient", "change of loss under noise")
    titles += ("m-coherence, training", "m-coherence, training and attacked")
    units = "nats per standard deviation", "nats", "examples", "examples"
    for axes, name, title, unit in zip(panels, names, titles, units, strict=True):
        for way, colour in (("ordinary", BLUE), ("splitting", VERMILION)):
            seeds = found["CNN", way, 0.0]
            if name.startswith("m_"):
                plots.curve(axes, seeds, name, colour)
                continue
            plots.curve(axes, seeds, f"{name}_train", colour, label=f"{way}, training")
            look = {"linestyle": "--", "label": f"{way}, held-out"}
            plots.curve(axes, seeds, f"{name}_held_out", colour, **look)
        plots.title(axes, title)
        plots.over_steps(axes)
        axes.set_ylabel(unit, color=GREY)
        axes.set_ylim(bottom=0)
    plots.legend(figure, panels[0])
    report.figure("stability", figure, "Stability to the images and coherence over the steps")
    keys = [f"{name}_{of}" for name in names[:2] for of in ("train", "held_out")] + [*names[2:]]
    rows = [
        [f"{network}, {WAYS[way]}", *(number(seeds, key) for key in keys)]
        for (network, way, _), seeds in found.items()
        if network in ("CNN", "MLP")
    ]
    head = ["after training", "input gradient, training", "held-out", "change, training"]
    report.table([*head, "held-out", "m, training", "m, both"], rows)


def number(seeds: list[list[Measured]], key: str) -> str:
    """A number at the end, for a table; it is missing where all gradients vanish."""
    if any(at[key] is None for run in seeds for at in run):
        return "-"
    return spread([late(run, key) for run in seeds], 2 if key.startswith("m_") else 4)
