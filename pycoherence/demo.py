"""One network on true and on random labels, and the coherence of its gradients as it learns.

`python -m pycoherence demo` runs this; docs/demo.md explains what comes out. With `--distributed`
the processes that `torchrun` has started do it together, each with a part of every batch.
"""

import copy
import json
import math
import platform
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.device import check_device
from pycoherence.extras import STUDIES
from pycoherence.torchrun import Processes, launched

try:
    import sklearn
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    from pycoherence.demo_picture import draw, half_fitted, ms
except ModuleNotFoundError as error:
    raise SystemExit(f"the demo needs {error.name}, which is not installed: {STUDIES}") from None

STEPS = 4000
SEED = 0
MEASUREMENTS = 100
WIDTH = 256
BATCH_SIZE = 100
LEARNING_RATE = 0.05

Batch = tuple[Tensor, Tensor]
"""Images `[B, 64]` and their labels `[B]`."""

Run = list[dict[str, Any]]
"""The findings of `measure`, at one step after another."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small only lose by sharing; nor does the result depend on the cores then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(
    *,
    steps: int = STEPS,
    seed: int = SEED,
    out: Path,
    device: str = "cpu",
    distributed: bool = False,
) -> None:
    """Train on both kinds of labels, write `coherence.json` and `coherence.png`, print a table.

    Args:
        steps: Training steps of each network.
        seed: Seed of the data split, the random labels, the initial weights and the batches.
        out: Folder for both files; made if it does not exist.
        device: Device to train on, as `torch.device` spells it.
        distributed: Train with all processes that `torchrun` has started, of which the first one
            writes and prints.

    Raises:
        ValueError: A number is out of range, the folder cannot be written to, the device cannot be
            used, or `torchrun` has not started a process of several.
    """
    check(steps, seed, out, device)
    with launched(device) if distributed else nullcontext((Processes(), device)) as (together, own):
        result = train_twice(steps, seed, own, together)
    if together.rank:
        return
    (out / "coherence.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / "coherence.png")
    Console().print(table(result["runs"]))
    print(f"wrote {out / 'coherence.png'} and {out / 'coherence.json'}")


def train_twice(steps: int, seed: int, device: str, processes: Processes) -> dict[str, Any]:
    """Train on both kinds of labels, and tell what was found and how it was made."""
    train, test = digits(seed, device)
    images, labels = train
    torch.manual_seed(seed)
    initial = network().to(device)
    shuffled = labels[torch.randperm(len(labels)).to(device)]

    runs: dict[str, Run] = {}
    with tqdm(total=2 * steps, unit="step", disable=processes.rank > 0 or None) as bar:
        for kind, targets in {"real": labels, "random": shuffled}.items():
            bar.set_description(f"{kind} labels")
            model = copy.deepcopy(initial)
            data = (images, targets), test
            runs[kind] = fit(model, *data, steps, seed, bar.update, processes)

    settings = {
        "steps": steps,
        "seed": seed,
        "device": device,
        "processes": processes.size,
        "width": WIDTH,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "training_examples": len(labels),
        "test_examples": len(test[1]),
    }
    return {"settings": settings, "versions": versions(), "runs": runs}


def digits(seed: int, device: str) -> tuple[Batch, Batch]:
    """The 8 x 8 digits that come with scikit-learn, standardized, as training and test set."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32, device=device) for x in split[:2])
    y_train, y_test = (torch.tensor(y, device=device) for y in split[2:])
    mean = x_train.mean(dim=0)
    std = (x_train - mean).std()
    return ((x_train - mean) / std, y_train), ((x_test - mean) / std, y_test)


def network() -> nn.Sequential:
    """Two hidden layers of ReLU."""
    layers = OrderedDict[str, nn.Module](
        hidden1=nn.Linear(64, WIDTH),
        relu1=nn.ReLU(),
        hidden2=nn.Linear(WIDTH, WIDTH),
        relu2=nn.ReLU(),
        output=nn.Linear(WIDTH, 10),
    )
    return nn.Sequential(layers)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def fit(
    model: nn.Module,
    train: Batch,
    test: Batch,
    steps: int,
    seed: int,
    advance: Callable[[], Any],
    processes: Processes,
) -> Run:
    """Train with plain SGD, measuring on the way."""
    images, labels = train
    trained = processes.wrapped(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    meter = pc.CoherenceMeter(model)
    batches = torch.Generator().manual_seed(seed)
    when = measured_steps(steps)
    found = [{"step": 0, **measure(model, meter, train, test, processes)}]
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(labels), generator=batches)[:BATCH_SIZE].to(labels.device)
        mine = processes.part(chosen)
        optimizer.zero_grad()
        (loss(trained, (images[mine], labels[mine])) * processes.share(chosen)).backward()
        optimizer.step()
        if step in when:
            found.append({"step": step, **measure(model, meter, train, test, processes)})
        advance()
    return found


def measured_steps(steps: int) -> set[int]:
    """From the first step to the last, rarer towards the end, where less happens."""
    return {round(steps ** (i / MEASUREMENTS)) for i in range(MEASUREMENTS + 1)}


def measure(
    model: nn.Module, meter: pc.CoherenceMeter, train: Batch, test: Batch, processes: Processes
) -> dict[str, Any]:
    """The coherence of all training examples at the present weights, and the accuracies."""
    images, labels = map(processes.part, train)
    meter.reset()
    meter.update(loss, (images, labels))
    if processes.group is not None:
        meter.all_reduce(processes.group)
    coherence = meter.compute()
    modules = {"network": coherence, **coherence.by_module}
    return {
        "train_accuracy": accuracy(model, train),
        "test_accuracy": accuracy(model, test),
        "modules": {name: numbers(part) for name, part in modules.items()},
        "parameters": {name: numbers(part) for name, part in coherence.by_parameter.items()},
    }


def numbers(coherence: pc.Coherence) -> dict[str, float]:
    """The coherence of one part of the network, ready for JSON."""
    return {
        "m": coherence.m,
        "alpha": coherence.alpha,
        "unbiased_alpha": coherence.unbiased_alpha,
        "sum_sq_norm": coherence.sum_sq_norm,
        "total_sq_norm": coherence.total_sq_norm,
    }


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of the images that are given their label."""
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def table(runs: dict[str, Run]) -> Table:
    """The facts to remember of each run: how well it learned, and its coherence part by part."""
    result = Table("labels", "accuracy", "part", title="m-coherence of the training examples")
    for column in ("start", "half fitted", "peak", "end"):
        result.add_column(column, justify="right")
    for kind, found in runs.items():
        last, half = found[-1], half_fitted(found)
        scores = [f"train {last['train_accuracy']:.1%}", f"test {last['test_accuracy']:.1%}"]
        for part, label, score in zip_longest(last["modules"], [kind], scores, fillvalue=""):
            m = ms(found, part)
            picked = m[0], math.nan if half is None else m[half], max(m), m[-1]
            result.add_row(label, score, part, *(f"{value:.2f}" for value in picked))
        result.add_section()
    return result


def check(steps: int, seed: int, out: Path, device: str) -> None:
    """Raise `ValueError` for a setting with which the demo cannot run."""
    if steps < 1:
        raise ValueError(f"expected steps to be at least 1, got {steps}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"expected seed to be in [0, 2**32), got {seed}")
    check_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(
            f"expected out to be a folder to write to, got {out}: {error.strerror}"
        ) from error


def versions() -> dict[str, str]:
    """The settings and versions that the numbers were made with."""
    return {
        "python": platform.python_version(),
        "pycoherence": pc.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }
