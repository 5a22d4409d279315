"""Examples that a network gets right soon, and the others: sets to learn from and to test on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pycoherence.studies.data import Data
from pycoherence.studies.measures import (
    Measured,
    coherence,
    correct,
    each_example,
    marked,
    marks,
    share,
)
from pycoherence.studies.models import Network
from pycoherence.studies.runs import Run
from pycoherence.studies.settings import Settings
from pycoherence.studies.trainer import Recipe

KINDS = ("easy", "hard", "random")
FRESH = 1000
"""Added to the seed, for a network other than that which told what is easy."""


def learner(data: Data, network: Network, epochs: int) -> Recipe:
    """SGD with momentum in batches of 100; no more than 100 000 of them."""
    steps = min(epochs * max(1, len(data.labels) // 100), 100_000)
    return Recipe(network, steps, lr=0.01, momentum=0.9)


def plan_find(settings: Settings, network: Network) -> dict[tuple, list[Run]]:
    """Two epochs, to see what is right soon."""
    recipe, data = learner(settings.data, network, 2), settings.data
    seeds = range(settings.seeds)
    return {
        ("find",): [Run(f"find-seed{seed}", recipe, data, seed, each_example) for seed in seeds]
    }


def half_way(history: Sequence[Measured]) -> Measured:
    """The first measurement with half of the training labels right, or the last."""
    return next((at for at in history if at["train"] >= 0.5), history[-1])


def divide(data: Data, right: str, *, alike: bool, seed: int) -> dict[str, Data]:
    """Equal numbers of easy, hard and random training examples, three quarters of them to train on.

    The others are their test sets. Nothing is to train on in one set and to test in another.

    Args:
        data: The data with these training examples.
        right: The `marks` of those that are easy.
        alike: Whether each class has equal numbers of each kind.
        seed: Seed of the division.

    Raises:
        ValueError: There are no examples of one kind.
    """
    easy = marked(right)
    groups = data.labels.cpu() if alike else torch.zeros(len(easy), dtype=torch.long)
    order = torch.randperm(len(easy), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(order) - len(order) // 4, len(order) // 4])
    train, test = (_of_each_kind(part, easy, groups) for part in parts)
    if not (len(train["easy"]) and len(test["easy"])):
        raise ValueError(
            f"expected easy and hard examples to train on and to test, got {int(easy.sum())} easy "
            f"ones of {len(easy)}; use a larger data set"
        )
    sets = {}
    for kind in KINDS:
        held = data.take(test[kind])
        tests = {"test_images": held.images, "test_labels": held.labels}
        sets[kind] = replace(data.take(train[kind]), **tests)
    return sets


def divide_each(data: Data, moments: Sequence[Measured], alike: bool) -> list[dict[str, Data]]:
    """`divide`, with each seed, by what is right at its moment."""
    rights = enumerate(at["right"] for at in moments)
    return [divide(data, right, alike=alike, seed=seed) for seed, right in rights]


def plan_sets(
    settings: Settings,
    network: Network,
    epochs: int,
    sets: Mapping[bool, Sequence[Mapping[str, Data]]],
) -> dict[tuple, list[Run]]:
    """Train on each set and test on all; and on easy and hard ones together, for the coherence.

    Args:
        settings: Settings of the study.
        network: To train.
        epochs: For how long: each set gets the number of steps of these epochs of all examples.
        sets: Results of `divide` for each seed, by `alike`.

    Returns:
        By kind, or `together`, and `alike`.
    """
    recipe = learner(settings.data, network, epochs)
    plans: dict[tuple, list[Run]] = {}
    for alike, each in sets.items():
        for seed, kinds in enumerate(each):
            joint = tested_on_all(kinds, settings.data)
            trained = [(kind, data, tests) for kind, data in joint.items()]
            for kind, data, measure in [*trained, ("together", together(kinds), coherences)]:
                name = f"{kind}-{'alike-' if alike else ''}seed{seed}"
                run = Run(name, recipe, data, FRESH + seed, measure)
                plans.setdefault((kind, alike), []).append(run)
    return plans


def tested_on_all(sets: Mapping[str, Data], data: Data) -> dict[str, Data]:
    """The sets with the test examples of all of them, and the original test set at the end."""
    every = [*sets.values(), data]
    images = torch.cat([each.test_images for each in every])
    labels = torch.cat([each.test_labels for each in every])
    return {
        kind: replace(each, test_images=images, test_labels=labels) for kind, each in sets.items()
    }


def together(sets: Mapping[str, Data]) -> Data:
    """The easy training examples, then the hard ones."""
    both = [sets["easy"], sets["hard"]]
    images, labels, truth = (
        torch.cat([getattr(each, name) for each in both]) for name in ("images", "labels", "truth")
    )
    return replace(both[0], images=images, labels=labels, truth=truth)


def tests(model: nn.Module, data: Data) -> Measured:
    """The share of the training labels that are given, and which of the test labels."""
    right = correct(model, data.test_images, data.test_labels)
    return {"train": share(correct(model, data.images, data.labels)), "right": marks(right)}


def tested(
    sets: Sequence[Mapping[str, Data]], found: Mapping[str, Sequence[Sequence[Measured]]]
) -> dict[str, list[list[Measured]]]:
    """The findings of `tests` by kind and seed, as accuracies on all kinds and `original`."""
    sizes = [len(kinds["easy"].test_labels) for kinds in sets]
    return {
        kind: [
            [_accuracies(at, size) for at in history]
            for history, size in zip(histories, sizes, strict=True)
        ]
        for kind, histories in found.items()
    }


def coherences(model: nn.Module, data: Data) -> Measured:
    """The m-coherence of both halves of `together`, and of every second example of it."""
    half = len(data.labels) // 2
    parts = {"easy": slice(half), "hard": slice(half, None), "random": slice(None, None, 2)}
    return {
        kind: coherence(model, data.images[part], data.labels[part]).m
        for kind, part in parts.items()
    }


def _of_each_kind(indices: Tensor, easy: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """In every group equal numbers of easy, hard and random ones: the first of them."""
    chosen: dict[str, list[Tensor]] = {kind: [indices[:0]] for kind in KINDS}
    for group in groups.unique():
        inside = indices[groups[indices] == group]
        kinds = (inside[easy[inside]], inside[~easy[inside]], inside)
        size = min(map(len, kinds))
        for kind, found in zip(KINDS, kinds, strict=True):
            chosen[kind].append(found[:size])
    return {kind: torch.cat(found) for kind, found in chosen.items()}


def _accuracies(at: Measured, size: int) -> Measured:
    """Shares of `right` on `tested_on_all`, whose kinds have `size` test examples each."""
    right = marked(at["right"]).double()
    parts = [*right[: len(KINDS) * size].split(size), right[len(KINDS) * size :]]
    shares = [part.mean().item() for part in parts]
    names = (*KINDS, "original")
    return {"step": at["step"], "train": at["train"], **dict(zip(names, shares, strict=True))}
