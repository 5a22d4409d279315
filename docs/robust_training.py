"""Training on digits half of whose labels are wrong, with and without robust gradients.

`python docs/robust_training.py` makes the picture and the tables of docs/robust-training.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator, PercentFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import pycoherence as pc
from pycoherence.demo import Batch, accuracy, digits, loss, network, one_thread
from pycoherence.plot import GREY, INK, bare

SEED = 0
NOISE = 0.5
EPOCHS = 80
LATE = 10
BATCH_SIZE = 12
LEARNING_RATE = 0.02
BATCH_SIZES = (3, 6, 12, 24, 48)


@dataclass(frozen=True)
class Method:
    """A way to train: what joins the per-example gradients, and what steps along the result.

    Attributes:
        max_norm: To which the joined gradient is clipped.
    """

    rule: pc.robust.Rule | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    max_norm: float = math.inf
    colour: str = INK


METHODS = {
    "SGD": Method(colour="#d55e00"),
    "RM3": Method(optimizer=pc.optim.RM3, colour="#e69f00"),
    "MedianOfMeans(3)": Method(pc.MedianOfMeans(3), colour="#009e73"),
    "Winsorized(3)": Method(pc.Winsorized(3), colour="#56b4e9"),
    "TrimmedMean(3)": Method(pc.TrimmedMean(3), colour="#0072b2"),
    "Winsorized(3), clipped": Method(pc.Winsorized(3), max_norm=3.0),
}

SWEPT = {
    "SGD": METHODS["SGD"],
    "RA3": Method(optimizer=pc.optim.RA3, colour=GREY),
    "RM3": METHODS["RM3"],
    "MedianOfMeans(3)": METHODS["MedianOfMeans(3)"],
}
"""Those that are trained with batches of other sizes; RA3 is the average to RM3's median."""


@dataclass(frozen=True)
class Data:
    """Images with noisy and with true labels, and a test set with true ones."""

    noisy: Batch
    true: Batch
    test: Batch

    @property
    def clean(self) -> float:
        """Share of the noisy labels that are true."""
        return (self.noisy[1] == self.true[1]).double().mean().item()


@dataclass(frozen=True)
class Scores:
    """Accuracies on the training labels, on what they should be, and on the test set."""

    noisy: float
    true: float
    test: float


def noisy_digits(seed: int = SEED) -> Data:
    """The digits of the demo, a share of whose training labels has been permuted."""
    train, test = digits(seed, "cpu")
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(labels), generator=generator) < NOISE
    wrong = labels[chosen]
    noisy = labels.clone()
    noisy[chosen] = wrong[torch.randperm(len(wrong), generator=generator)]
    return Data((images, noisy), train, test)


def train(
    method: Method, data: Data, *, epochs: int, batch_size: int, lr: float, seed: int = SEED
) -> list[Scores]:
    """The accuracies after each epoch, from the same weights and batches for every method."""
    torch.manual_seed(seed)
    model = network()
    optimizer = method.optimizer(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(epochs):
        for batch in batches(data.noisy, batch_size, generator):
            step(model, optimizer, method, batch)
        found.append(scores(model, data))
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method, batch: Batch) -> None:
    """One step along the robust gradient of a batch."""
    optimizer.zero_grad()
    with nullcontext() if method.rule is None else pc.aggregate(model, method.rule):
        loss(model, batch).backward()
    if method.max_norm < math.inf:
        nn.utils.clip_grad_norm_(model.parameters(), method.max_norm)
    optimizer.step()


def batches(data: Batch, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, all of the same size: what is left over waits for the next epoch's shuffle."""
    images, labels = data
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order[: len(labels) // size * size].split(size):
        yield images[chosen], labels[chosen]


def scores(model: nn.Module, data: Data) -> Scores:
    """The accuracies of the present weights."""
    return Scores(*(accuracy(model, batch) for batch in (data.noisy, data.true, data.test)))


def late(found: Sequence[Scores]) -> Scores:
    """The medians of the last epochs, which no single one can spoil."""
    last = found[-LATE:]
    names = (field.name for field in fields(Scores))
    return Scores(*(median(map(attrgetter(name), last)) for name in names))


@one_thread()
def main(out: Path) -> None:
    """Train with every method, some with batches of other sizes; write the picture to `out`."""
    data = noisy_digits()
    runs, by_size = {}, {}
    with tqdm(total=len(METHODS) + len(SWEPT) * len(BATCH_SIZES), unit="run") as bar:
        for name, method in METHODS.items():
            runs[name] = train(method, data, epochs=EPOCHS, batch_size=BATCH_SIZE, lr=LEARNING_RATE)
            bar.update()
        for name, method in SWEPT.items():
            by_size[name] = []
            for size in BATCH_SIZES:
                # So that the same images move the weights as far, whatever the size.
                lr = LEARNING_RATE * size / BATCH_SIZE
                found = train(method, data, epochs=EPOCHS, batch_size=size, lr=lr)
                by_size[name].append(late(found).noisy)
                bar.update()
    draw(runs, by_size, data.clean, out)
    Console().print(table(runs, data.clean), sizes_table(by_size))


def table(runs: Mapping[str, Sequence[Scores]], clean: float) -> Table:
    """The accuracies in the end; the best test accuracy, and the worst of the second half."""
    title = f"last {LATE} of {EPOCHS} epochs; {clean:.1%} of the labels are true"
    result = Table("method", title=title)
    for column in ("given", "true", "test", "best test", "worst test"):
        result.add_column(column, justify="right")
    for name, found in runs.items():
        end, tests = late(found), [at.test for at in found]
        shares = end.noisy, end.true, end.test, max(tests), min(tests[EPOCHS // 2 :])
        result.add_row(name, *(f"{share:.1%}" for share in shares))
    return result


def sizes_table(by_size: Mapping[str, Sequence[float]]) -> Table:
    """The accuracy on the noisy labels in the end, by batch size."""
    result = Table("method", *map(str, BATCH_SIZES), title="training labels fitted, by batch size")
    for name, shares in by_size.items():
        result.add_row(name, *(f"{share:.1%}" for share in shares))
    return result


def draw(
    runs: Mapping[str, Sequence[Scores]],
    by_size: Mapping[str, Sequence[float]],
    clean: float,
    path: Path,
) -> None:
    """Write the picture: noisy labels fitted over the epochs, test accuracy, batch sizes."""
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    figure = Figure(figsize=(9, 8), layout=layout)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.5, 1])
    large = figure.add_subplot(grid[0, :])
    test, sizes = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    for axes in (large, test, sizes):
        bare(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (large, sizes):
        axes.axhline(clean, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0.4, 1.02)
    epochs = range(1, EPOCHS + 1)
    for name, found in runs.items():
        look = {"color": METHODS[name].colour, "linewidth": 2, "label": name}
        large.plot(epochs, [at.noisy for at in found], **look)
        test.plot(epochs, [at.test for at in found], **look)
    for name, shares in by_size.items():
        sizes.plot(BATCH_SIZES, shares, "o-", color=SWEPT[name].colour, linewidth=2, label=name)
    explain(large, clean)
    test.set_title("test accuracy, true labels", loc="left", fontsize=11, color=INK)
    for axes in (large, test):
        axes.set_xlabel("epoch", color=GREY)
    sizes.set_title("training labels fitted, by batch size", loc="left", fontsize=11, color=INK)
    sizes.set_xscale("log")
    sizes.xaxis.set_minor_locator(NullLocator())
    sizes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    sizes.margins(x=0.05)
    sizes.set_xlabel("batch size", color=GREY)
    sizes.legend(frameon=False, labelcolor="linecolor")
    figure.savefig(path, dpi=160)


def explain(axes: Axes, clean: float) -> None:
    """Headline, what is drawn, and the names of the curves in the order of their ends."""
    headline = "Who learns the wrong labels?"
    axes.set_title(f"{headline}\n", loc="left", fontsize=14, fontweight="bold", color=INK)
    offset = {"textcoords": "offset points"}
    axes.annotate(
        f"training labels fitted, half of which have been permuted; batches of {BATCH_SIZE}",
        (0, 1), (0, 8), xycoords="axes fraction", fontsize=11, color=GREY, **offset,
    )  # fmt: skip
    left = 0, clean
    label = {"xycoords": axes.get_yaxis_transform(), "color": GREY}
    axes.annotate(f"{clean:.0%} are true", left, (6, 4), **label, **offset)
    axes.legend(frameon=False, labelcolor="linecolor", fontsize=12, loc="upper left")


if __name__ == "__main__":
    main(Path(__file__).with_name("robust-training.png"))
