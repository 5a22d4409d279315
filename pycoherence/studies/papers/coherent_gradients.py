"""Chatterjee 2020, arXiv:2002.10657: what examples have in common is learned first.

Label noise, whose gradients make up the step, and gradients robust against what few want.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from matplotlib.ticker import PercentFormatter
from torch import nn

import pycoherence as pc
from pycoherence.plot import GREY
from pycoherence.studies import plots
from pycoherence.studies.corrupt import permuted_labels
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import Gradient, Mean, Robust, SignOfSum, SumOfSigns, loss
from pycoherence.studies.measures import Measured, accuracies, late, share
from pycoherence.studies.models import MLP
from pycoherence.studies.plots import BLUE, VERMILION
from pycoherence.studies.report import Report, first_steps, late_shares, percent, spread
from pycoherence.studies.runs import Run, train_each
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

SAMPLE = 2000
PERMUTATIONS = 20

Found = Mapping[tuple[str, float], list[list[Measured]]]
"""The measurements with each seed, by what was stepped along and the noise."""


@dataclass(frozen=True)
class Scale:
    """How much is trained: a wide network on all noise, a deep one with robust gradients.

    Attributes:
        clipped: Values winsorized on each side of a batch of 100, which the paper calls c.
    """

    noise: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    wide: tuple[int, ...] = (1024,)
    robust_noise: tuple[float, ...] = (0.5,)
    deep: tuple[int, ...] = (128, 128, 128)
    clipped: tuple[int, ...] = (0, 2, 4, 8, 32)
    epochs: int = 200


QUICK = Scale((0.0, 0.5, 1.0), (256,), (0.5,), (64, 64), (0, 8), 60)


def study(settings: Settings) -> Report:
    """Train, draw and report."""
    scale = QUICK if settings.quick else Scale()
    report = Report("Coherent gradients (Chatterjee 2020)")
    plans = plan_noise(settings, scale), plan_robust(settings, scale)
    found = train_each({**plans[0], **plans[1]}, settings.runs)
    report.keep({**plans[0], **plans[1]}, found)
    noise, robust = ({key: found[key] for key in part} for part in plans)
    report.text(
        "Labels are chosen with the probability given as noise, and permuted among each other "
        "([Chatterjee 2020](https://arxiv.org/abs/2002.10657)). Numbers are medians of the last "
        "tenth of the steps, as means of the seeds ± half their range; bands in the pictures go "
        "from the least seed to the largest."
    )
    report_noise(report, noise)
    report_shares(report, noise)
    report_robust(report, robust, settings.data.classes)
    return report


def plan_noise(settings: Settings, scale: Scale) -> dict[tuple[str, float], list[Run]]:
    """Plain SGD with each share of noise."""
    recipe = Recipe(MLP(scale.wide), steps(settings.data, scale.epochs), lr=0.1)
    return {("SGD", noise): plan(settings, recipe, "noise", noise) for noise in scale.noise}


def plan_robust(settings: Settings, scale: Scale) -> dict[tuple[str, float], list[Run]]:
    """Winsorized gradients of several k, and signs."""
    kinds: dict[str, tuple[Gradient, float]] = {
        f"k = {k}": (Robust(pc.Winsorized(k)) if k else Mean(), 0.1) for k in scale.clipped
    }
    kinds |= {"sign of sum": (SignOfSum(), 0.001), "sum of signs": (SumOfSigns(), 0.001)}
    plans = {}
    for noise in scale.robust_noise:
        for kind, (gradient, lr) in kinds.items():
            count = steps(settings.data, scale.epochs)
            recipe = Recipe(MLP(scale.deep), count, lr, gradient=gradient)
            plans[kind, noise] = plan(settings, recipe, kind.replace(" ", ""), noise)
    return plans


def plan(settings: Settings, recipe: Recipe, name: str, noise: float) -> list[Run]:
    """One recipe with each seed."""
    runs = []
    for seed in range(settings.seeds):
        labels = permuted_labels(settings.data.truth, noise, seed=seed)
        data = settings.data.labelled(labels)
        runs.append(Run(f"{name}-{100 * noise:.0f}-seed{seed}", recipe, data, seed, measure))
    return runs


def steps(data: Data, epochs: int) -> int:
    """The number of steps, of batches of 100; no more than in the paper."""
    return min(epochs * max(1, len(data.labels) // 100), 100_000)


def measure(model: nn.Module, data: Data) -> Measured:
    """Accuracies, and the shares of the pristine in the squared norm of the sample's gradient.

    The null world is that of tags which say nothing: pristine and corrupt, permuted.
    """
    sample = data.first(SAMPLE)
    with pc.collect(model, pc.Dots("mean")) as record:
        loss(model, (sample.images, sample.labels)).backward()
    model.zero_grad()
    tags, generator = sample.pristine, torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(tags), generator=generator) for _ in range(PERMUTATIONS)]
    null = [pc.metrics.group_share(record.dots, tags[order])[1].item() for order in orders]
    return {
        **accuracies(model, data),
        "f_pristine": pc.metrics.group_share(record.dots, tags)[1].item(),
        "f_corrupt": pc.metrics.group_share(record.dots, tags)[0].item(),
        "null": sum(null) / len(null),
        "null_low": min(null),
        "null_high": max(null),
    }


def report_noise(report: Report, found: Found) -> None:
    """How well labels are learned, by noise."""
    report.text("## Learning with label noise")
    figure, (train_axes, test_axes) = plots.panels(1, 2, "Learning labels of which some are wrong")
    rows = []
    for shade, ((_, noise), seeds) in zip(plots.SHADES, found.items(), strict=False):
        for axes, key in ((train_axes, "train"), (test_axes, "test")):
            plots.curve(axes, seeds, key, shade, label=f"{noise:.0%} noise")
        keys = ("true", "train", "pristine", "corrupt", "test")
        best = percent([max(at["test"] for at in run) for run in seeds])
        half = first_steps(seeds, "train", 0.5), first_steps(seeds, "train", 0.95)
        rows.append([f"{noise:.0%}", *(late_shares(seeds, key) for key in keys), best, *half])
    for axes, name in ((train_axes, "given training labels fitted"), (test_axes, "test accuracy")):
        plots.title(axes, name)
        plots.over_steps(axes)
        plots.as_percent(axes)
    plots.legend(figure, train_axes)
    report.figure("noise", figure, "Training labels fitted and test accuracy over the steps")
    head = ["noise", "true labels", "fitted", "of the pristine", "of the corrupt", "test"]
    report.table([*head, "best test", "half fitted at step", "95% at step"], rows)


def report_shares(report: Report, found: Found) -> None:
    """Who makes up the gradient, with some noise."""
    report.text(
        "## Whose gradient it is\n\nThe share f of a group is ⟨g, g_group⟩ / ⟨g, g⟩, with g the "
        f"summed gradient of the training examples ({SAMPLE} at most) and g_group that of the "
        "group alone: f_p of the pristine, f_c of the corrupt. Null: the share of the pristine if "
        "the tags pristine and corrupt are permuted. Crossing: the first measurement with f_c "
        "above f_p, after half of the pristine are fitted."
    )
    mixed = {noise: seeds for (_, noise), seeds in found.items() if 0 < noise < 1}
    figure, axes = plots.panels(2, len(mixed), "Whose gradient it is")
    rows = []
    for column, (noise, seeds) in enumerate(mixed.items()):
        shares, right = axes[column], axes[column + len(mixed)]
        plots.curve(shares, seeds, "f_pristine", BLUE, label="pristine")
        plots.curve(shares, seeds, "f_corrupt", VERMILION, label="corrupt")
        shown = plots.apart(seeds[0])
        at = [seeds[0][i]["step"] for i in shown]
        ends = [[run[i][end] for i in shown] for run in seeds for end in ("null_low", "null_high")]
        plots.line(shares, at, ends, GREY, linewidth=1, linestyle="--", label="pristine, null")
        plots.curve(right, seeds, "pristine", BLUE)
        plots.curve(right, seeds, "corrupt", VERMILION)
        plots.title(shares, f"{noise:.0%} noise: share of ‖g‖²")
        plots.title(right, "labels fitted")
        for panel in (shares, right):
            plots.over_steps(panel)
            plots.as_percent(panel)
        shares.set_ylim(-0.5, 1.5)
        rows.append([f"{noise:.0%}", *shares_row(seeds)])
    plots.legend(figure, axes[0])
    report.figure("shares", figure, "Shares of pristine and corrupt examples over the steps")
    head = ["noise", "null", "f_p when half of the pristine are fitted", "crossing at step"]
    report.table([*head, "pristine fitted then", "corrupt fitted then"], rows)


def shares_row(seeds: list[list[Measured]]) -> list[str]:
    """The share of the pristine early on, and where that of the corrupt overtakes it."""
    half = [next((at for at in run if at["pristine"] >= 0.5), run[-1]) for run in seeds]
    cells = [percent([run[0]["true"] for run in seeds]), percent([at["f_pristine"] for at in half])]
    after = [run[run.index(at) :] for run, at in zip(seeds, half, strict=True)]
    crossed = [[at for at in run if at["f_corrupt"] > at["f_pristine"]] for run in after]
    if not all(crossed):
        return [*cells, "never", "-", "-"]
    cells.append(spread([run[0]["step"] for run in crossed], 0))
    return [*cells, *(percent([run[0][key] for run in crossed]) for key in ("pristine", "corrupt"))]


def report_robust(report: Report, found: Found, classes: int) -> None:
    """The labels that robust gradients keep from being learned."""
    report.text(
        "## Robust gradients\n\nWinsorized gradients clip, at each coordinate, the k lowest and "
        "the k highest values of a batch of 100; k = 0 is SGD. Overfit is training less test "
        "accuracy; adjusted, less what a network that knows nothing but the truth could reach: "
        "noise / classes + (1 - noise) times test accuracy."
    )
    noises = sorted({noise for _, noise in found}, reverse=True)
    most = {kind: seeds for (kind, noise), seeds in found.items() if noise == noises[0]}
    winsorized = {kind: seeds for kind, seeds in most.items() if kind.startswith("k")}
    figure, (fitted, test, over) = plots.panels(
        1, 3, "Gradients that leave out what few examples want"
    )
    for axes, name in ((fitted, "labels fitted"), (test, "test accuracy")):
        plots.title(axes, f"{noises[0]:.0%} noise: {name}")
        plots.over_steps(axes)
        plots.as_percent(axes)
    for shade, (kind, seeds) in zip(plots.SHADES, winsorized.items(), strict=False):
        plots.curve(fitted, seeds, "train", shade, label=kind)
        plots.curve(test, seeds, "test", shade, label=kind)
    true = share(torch.tensor([run[0]["true"] for run in most["k = 0"]]))
    fitted.axhline(true, color=GREY, linewidth=1, linestyle="--", label="true labels")
    plots.legend(figure, fitted)
    for colour, noise in zip((BLUE, VERMILION), noises, strict=False):
        values = [overfits(found[kind, noise], noise, classes)[1] for kind in winsorized]
        ks = [int(kind.split()[-1]) for kind in winsorized]
        label = f"{noise:.0%} noise"
        plots.line(over, ks, list(zip(*values, strict=True)), colour, label=label, marker="o")
    plots.title(over, "adjusted overfit, by k")
    over.set_xlabel("values clipped on each side", color=GREY)
    over.yaxis.set_major_formatter(PercentFormatter(1))
    over.legend(frameon=False, labelcolor="linecolor")
    report.figure("robust", figure, "Labels fitted, test accuracy and overfit by k")
    head = ["noise", "gradient", "true labels", "fitted", "test", "overfit", "adjusted overfit"]
    report.table(head, [robust_row(*key, seeds, classes) for key, seeds in found.items()])


def robust_row(
    kind: str, noise: float, seeds: list[list[Measured]], classes: int
) -> tuple[str, ...]:
    """How much one gradient learned at one noise, for a table."""
    shares = (late_shares(seeds, key) for key in ("true", "train", "test"))
    return f"{noise:.0%}", kind, *shares, *map(percent, overfits(seeds, noise, classes))


def overfits(
    seeds: list[list[Measured]], noise: float, classes: int
) -> tuple[list[float], list[float]]:
    """For each seed the training less the test accuracy, as it is and adjusted for the noise."""
    train, test = ([late(run, key) for run in seeds] for key in ("train", "test"))
    plain = [a - b for a, b in zip(train, test, strict=True)]
    fair = [noise / classes + (1 - noise) * b for b in test]
    return plain, [a - b for a, b in zip(train, fair, strict=True)]
