"""Zielinski, Krishnan, Chatterjee 2020, arXiv:2003.07422: directions that few or many share.

Medians of three mini-batches against label noise, easy and hard examples, the order of learning.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, product

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from pycoherence.plot import GREY
from pycoherence.studies import easy_hard, measures, plots
from pycoherence.studies.corrupt import uniform_labels
from pycoherence.studies.data import Data
from pycoherence.studies.measures import Measured, accuracies, each_example, late, share
from pycoherence.studies.models import MLP, Network, ResNet
from pycoherence.studies.plots import BLUE, GREEN, VERMILION
from pycoherence.studies.report import Report, late_shares, percent, spread
from pycoherence.studies.runs import Run, train_each
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

METHODS = {
    "SGD": ("SGD", 1, VERMILION),
    "RA3": ("RA3", 1, "#e69f00"),
    "RM3": ("RM3", 1, BLUE),
    "SGD 3B": ("SGD", 3, "#cc79a7"),
    "M3": ("M3", 1, GREEN),
}
"""The optimizer, how many times larger its batches are, and its colour."""

TAGS = {"pristine": BLUE, "corrupt": VERMILION}
COLOURS = {"easy": BLUE, "hard": VERMILION, "random": GREY}
Found = Mapping[tuple, list[list[Measured]]]
"""The measurements with each seed."""

Times = dict[tuple[float, str, str], list[tuple[Tensor, Tensor]]]
"""By noise, method and tag, with each seed: the steps of being right once, and for good."""


@dataclass(frozen=True)
class Setting:
    """The task that optimizers are compared on.

    Attributes:
        share: That of the training set which is used.
    """

    network: Network
    batch_size: int
    epochs: int
    share: float = 1.0
    measurements: int = 40
    measure: Callable[[nn.Module, Data], Measured] = accuracies

    @property
    def name(self) -> str:
        """For tables and pictures."""
        return f"{type(self.network).__name__}, batches of {self.batch_size}"


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        compared: With the first, when each example is learned, and by its network, which are easy.
        epochs: To learn easy and hard examples.
    """

    compared: tuple[Setting, ...] = (
        Setting(MLP((256,)), 10, 40, measure=each_example),
        Setting(MLP((256,)), 100, 200),
        Setting(ResNet((16, 32)), 10, 40, 0.2, measurements=15),
    )
    noise: tuple[float, ...] = (0.0, 0.5)
    epochs: int = 50


QUICK = Scale(
    (
        Setting(MLP((64,)), 10, 8, 0.5, measurements=30, measure=each_example),
        Setting(ResNet((8,)), 10, 4, 0.1, measurements=5),
    ),
    epochs=20,
)


def study(settings: Settings) -> Report:
    """Train, draw and report."""
    scale = QUICK if settings.quick else Scale()
    report = Report("Weak and strong gradient directions (Zielinski et al. 2020)")
    network = scale.compared[0].network
    finding = easy_hard.plan_find(settings, network)
    first = train_each(finding, settings.runs)
    moments = [easy_hard.half_way(run) for run in first["find",]]
    sets = {alike: easy_hard.divide_each(settings.data, moments, alike) for alike in (False, True)}
    plans = {
        **plan_compared(settings, scale),
        **easy_hard.plan_sets(settings, network, scale.epochs, sets),
        **plan_order(settings, scale),
    }
    found = train_each(plans, settings.runs)
    report.keep({**finding, **plans}, {**first, **found})
    report.text(
        "With the probability called noise a label is drawn anew, from all classes "
        "([Zielinski et al. 2020](https://arxiv.org/abs/2003.07422)). Numbers are medians of the "
        "last tenth of the steps, means of the seeds ± half their range."
    )
    report_compared(report, {key: found[key] for key in plans if key[0] == "compared"})
    report_sets(report, sets, moments, found)
    report_order(report, plans, {key: found[key] for key in plans if key[0] == "order"})
    return report


def plan_compared(settings: Settings, scale: Scale) -> dict[tuple, list[Run]]:
    """Each optimizer with each noise; every seed has other noise, weights and batches."""
    return {
        ("compared", setting.name, noise, method): [
            plan(settings.data, setting, noise, method, seed, noise_seed=seed)
            for seed in range(settings.seeds)
        ]
        for setting, noise, method in product(scale.compared, scale.noise, METHODS)
    }


def plan_order(settings: Settings, scale: Scale) -> dict[tuple, list[Run]]:
    """SGD and RM3 on the same labels with other weights and batches, at least two of them."""
    return {
        ("order", noise, method): [
            plan(settings.data, scale.compared[0], noise, method, seed, noise_seed=0)
            for seed in range(max(2, settings.seeds))
        ]
        for noise, method in product(scale.noise, ("SGD", "RM3"))
    }


def plan(
    data: Data, setting: Setting, noise: float, method: str, seed: int, *, noise_seed: int
) -> Run:
    """One training; all methods see the same number of mini-batches, and no more than 100 000."""
    optimizer, factor, _ = METHODS[method]
    data = data.first(round(setting.share * len(data.labels)))
    data = data.labelled(uniform_labels(data.truth, noise, data.classes, seed=noise_seed))
    batches = min(setting.epochs * max(1, len(data.labels) // setting.batch_size), 100_000)
    recipe = Recipe(
        setting.network,
        max(1, batches // factor),
        lr=0.1,
        batch_size=setting.batch_size * factor,
        optimizer=optimizer,
        measurements=setting.measurements,
    )
    kind = f"{type(setting.network).__name__}{setting.batch_size}-{method.replace(' ', '')}"
    return Run(f"{kind}-{100 * noise:.0f}-seed{seed}", recipe, data, seed, setting.measure)


def report_compared(report: Report, found: Found) -> None:
    """How well labels are learned, by optimizer."""
    report.text(
        "## Medians of three mini-batches\n\nAll methods see equally many mini-batches and have a "
        "learning rate of 0.1. RM3 and its control RA3 step along the median and the average of "
        "the last three after each; M3 and its control, SGD 3B with batches three times as large, "
        "step once for every three. Overfit is training less test accuracy."
    )
    names = list(dict.fromkeys(name for _, name, _, _ in found))
    noise = max(noise for _, _, noise, _ in found)
    figure, axes = plots.panels(2, len(names), f"Learning labels with {noise:.0%} noise")
    rows = []
    for (_, name, share_of_noise, method), seeds in found.items():
        rows.append([name, f"{share_of_noise:.0%}", method, *compared_row(seeds)])
        if share_of_noise == noise:
            draw_method(axes[names.index(name) :: len(names)], method, seeds)
    titles = [*(f"{name}\nlabels fitted" for name in names), *["test accuracy"] * len(names)]
    for panel, title in zip(axes, titles, strict=True):
        plots.title(panel, title)
        plots.over_steps(panel)
        plots.as_percent(panel)
        panel.set_xlabel("mini-batches seen", color=GREY)
    for name, look in (("corrupt", "-"), ("pristine", "--")):
        axes[0].plot([], [], look, color=GREY, linewidth=1, label=name)
    plots.legend(figure, axes[0])
    report.figure("medians", figure, f"Labels fitted and test accuracy with {noise:.0%} noise")
    head = ["network", "noise", "method", "true labels", "fitted", "of the pristine"]
    report.table([*head, "of the corrupt", "test", "best test", "overfit"], rows)


def compared_row(seeds: list[list[Measured]]) -> list[str]:
    """The results of one method."""
    keys = ("true", "train", "pristine", "corrupt", "test")
    best = percent([max(at["test"] for at in run) for run in seeds])
    overfit = percent([late(run, "train") - late(run, "test") for run in seeds])
    return [*(late_shares(seeds, key) for key in keys), best, overfit]


def draw_method(panels: list[Axes], method: str, seeds: list[list[Measured]]) -> None:
    """The curves of one method, over the mini-batches of ordinary size that it saw."""
    (fitted, test), (_, factor, colour) = panels, METHODS[method]
    scaled = [[{**at, "step": factor * at["step"]} for at in run] for run in seeds]
    plots.curve(fitted, scaled, "pristine", colour, linestyle="--", linewidth=1)
    plots.curve(fitted, scaled, "corrupt", colour, label=method)
    plots.curve(test, scaled, "test", colour)


def report_sets(
    report: Report,
    sets: Mapping[bool, list[dict[str, Data]]],
    moments: list[Measured],
    found: Found,
) -> None:
    """Easy and hard examples: what they teach about each other, and how coherent they are."""
    report.text(
        "## Easy and hard examples\n\nEasy is what a network gets right at the first measurement "
        f"with half of the labels fitted: step {spread([at['step'] for at in moments], 0)}, "
        f"{percent([at['train'] for at in moments])} right. New networks learn as many easy, hard "
        "or random examples, and are tested on others, with classes as they come or as many of "
        "each class in all kinds; m is their m-coherence while a network learns easy and hard ones"
        "; for random, of half of each."
    )
    figure, axes = plots.panels(2, 2, "Easy and hard examples")
    rows = []
    for column, (alike, each) in enumerate(sets.items()):
        classes = "alike" if alike else "as they come"
        results = easy_hard.tested(each, {kind: found[kind, alike] for kind in easy_hard.KINDS})
        n = spread([len(kinds["easy"].labels) for kinds in each], 0)
        keys, joint = ("train", *easy_hard.KINDS, "original"), found["together", alike]
        for kind, seeds in results.items():
            ms = [[run[0][kind] for run in joint], [late(run, kind) for run in joint]]
            cells = (late_shares(seeds, key) for key in keys)
            rows.append([classes, kind, n, *cells, *(spread(values, 1) for values in ms)])
        above, below = axes[column], axes[column + 2]
        plots.bars(above, results, ("easy", "hard", "original"), COLOURS)
        for kind, colour in COLOURS.items():
            plots.curve(below, joint, kind, colour, label=kind)
        plots.title(above, f"classes {classes}\ntest accuracy, by kind trained on")
        plots.title(below, f"m-coherence of {n} examples")
        above.set_xlabel("tested on", color=GREY)
        plots.over_steps(below)
        plots.logarithmic(below)
    plots.legend(figure, axes[2])
    report.figure("easy", figure, "Test accuracies between easy and hard examples; m-coherence")
    head = ["classes", "trained on", "examples", "fitted", "test: easy", "hard", "random"]
    report.table([*head, "original test", "m at first", "m in the end"], rows)


def report_order(report: Report, plans: Mapping[tuple, list[Run]], found: Found) -> None:
    """When each example is learned, and whether that depends on the seed."""
    report.text(
        "## The order of learning\n\nRight once: from the first measurement that finds it so; for "
        "good: from which on it stays so. Agreement is Spearman's correlation of these steps "
        "between two seeds with the same data and labels, over the examples of one row."
    )
    times = learning_times(plans, found)
    most = max(noise for noise, _, _ in times)
    figure, axes = plots.panels(1, 2, f"When labels are learned, with {most:.0%} noise")
    rows = []
    for (noise, method, group), seeds in times.items():
        rows.append([f"{noise:.0%}", group, method, *order_row(seeds)])
        if noise == most:
            steps = [at["step"] for at in found["order", noise, method][0]]
            look = {"label": f"{group}, {method}", "linestyle": "-" if method == "SGD" else "--"}
            for i, panel in enumerate(axes):
                learnt = [[share(each[i] <= step) for step in steps] for each in seeds]
                plots.line(panel, steps, learnt, TAGS[group], **look)
    for panel, name in zip(axes, ("examples right once", "examples right for good"), strict=True):
        plots.title(panel, name)
        plots.over_steps(panel)
        plots.as_percent(panel)
    plots.legend(figure, axes[0])
    report.figure("order", figure, "Examples right once and for good, over the steps")
    head = ["noise", "labels", "method", "half right once at step", "half for good at step"]
    report.table([*head, "not for good", "agreement: once", "for good"], rows)


def learning_times(plans: Mapping[tuple, list[Run]], found: Found) -> Times:
    """From which step on the pristine and the corrupt examples are right."""
    times: Times = {}
    for key, seeds in found.items():
        pristine = plans[key][0].data.pristine.cpu()
        for group, tag in zip(TAGS, (pristine, ~pristine), strict=True):
            if tag.any():
                times[key[1], key[2], group] = [
                    (measures.learnt_first(run)[tag], measures.learnt_last(run)[tag])
                    for run in seeds
                ]
    return times


def order_row(seeds: list[tuple[Tensor, Tensor]]) -> list[str]:
    """When examples are learned, and how well the seeds agree on the order."""
    halves = [[each[i].median().item() for each in seeds] for i in (0, 1)]
    steps = ["never" if max(values) == torch.inf else spread(values, 0) for values in halves]
    never = percent([share(last.isinf()) for _, last in seeds])
    pairs = list(combinations(seeds, 2))
    agree = [spread([measures.spearman(a[i], b[i]) for a, b in pairs]) for i in (0, 1)]
    return [*steps, never, *agree]
