"""The coherence of a network and of its layers, from the gradients of examples or of batches."""

import copy

import torch
from torch import Tensor, nn

import pycoherence as pc
from pycoherence import metrics
from pycoherence.studies.data import Data
from pycoherence.studies.gradients import loss
from pycoherence.studies.measures import Measured, accuracies

SAMPLE = 2000
"""The most training examples that are measured: the first ones."""

SUBSAMPLES = (1, 3)
"""Mini-batches that make one."""

Sums = tuple[Tensor, Tensor]
"""Dot products of gradients with their mean, and their squared norms: `[n]` each."""


def layers(model: nn.Module) -> dict[str, str]:
    """Names of the weights of the first, a middle and the last layer."""
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    return {"first": names[0], "middle": names[(len(names) - 1) // 2], "last": names[-1]}


def example_sums(model: nn.Module, sample: Data) -> dict[str, Sums]:
    """Dots and norms of the examples' gradients, in the whole network and in its `layers`."""
    with pc.collect(model, pc.SqNorms(), pc.Dots("mean")) as record:
        loss(model, (sample.images, sample.labels)).backward()
    model.zero_grad()
    parts = {part: record.by_parameter[name] for part, name in layers(model).items()}
    return {part: (at.dots, at.sq_norms) for part, at in {"whole": record, **parts}.items()}


def batch_grams(model: nn.Module, sample: Data, size: int) -> dict[str, Tensor]:
    """Dot products of the gradients of mini-batches, in the whole network and in its `layers`.

    They are those of a copy in training mode, where BatchNorm mixes the examples of a batch; the
    model keeps its running statistics. Examples that do not fill a last batch are left out.
    """
    model = copy.deepcopy(model).train()
    named = dict(model.named_parameters())
    batches = zip(sample.images.split(size), sample.labels.split(size), strict=True)
    found = [
        torch.autograd.grad(loss(model, batch), [*named.values()])
        for batch in batches
        if len(batch[1]) == size
    ]
    rows = {
        name: torch.stack(each).flatten(1).double()
        for name, each in zip(named, zip(*found, strict=True), strict=True)
    }
    grams = {name: each @ each.T for name, each in rows.items()}
    parts = {part: grams[name] for part, name in layers(model).items()}
    return {"whole": torch.stack([*grams.values()]).sum(0), **parts}


def of_examples(sums: dict[str, Sums]) -> Measured:
    """m-coherence of each part, and its interval (`low`, `high`)."""
    found = Measured()
    for part, each in sums.items():
        value, _, low, high = metrics.m_coherence_interval(*each)
        found |= {part: value.item(), f"{part} low": low.item(), f"{part} high": high.item()}
    return found


def of_batches(grams: dict[str, Tensor], size: int, n: int) -> Measured:
    """An estimate of the m-coherence of `n` examples from the gradients of their mini-batches."""
    found = Measured()
    for part, gram in grams.items():
        value, _, low, high = metrics.alpha_interval(gram.mean(1), gram.diagonal())
        for name, alpha in ((part, value), (f"{part} low", low), (f"{part} high", high)):
            found[name] = 1 + (n - 1) * metrics.example_alpha(alpha.clamp(max=1), size).item()
    return found


def of_subsamples(sums: Sums, gram: Tensor, size: int, batches: int) -> Measured:
    """Means of alpha, with and without the diagonal, over subsamples of `batches` mini-batches.

    Args:
        sums: The sums of the examples.
        gram: Gram matrix of the mini-batches of the same gradients.
        size: Examples in each mini-batch.
        batches: How many make one subsample.
    """
    n, squares = batches * size, sums[1].double()
    plain, free = [], []
    for i in range(0, len(gram) - batches + 1, batches):
        s = size**2 * gram[i : i + batches, i : i + batches].sum().item()
        q = squares[i * size : i * size + n].sum().item()
        plain.append(metrics.alpha(s, q, n))
        free.append(metrics.unbiased_alpha(s, q, n))
    return {f"plain {n}": sum(plain) / len(plain), f"free {n}": sum(free) / len(free)}


def batch_size(data: Data) -> int:
    """The batch size of training and of what is measured: 100, or a quarter of few examples."""
    return max(1, min(100, len(data.labels) // 4))


def measure_examples(model: nn.Module, data: Data) -> Measured:
    """Accuracies, m-coherence, the same from mini-batches (`inverted`), and alpha of subsamples."""
    sample, size = data.first(SAMPLE), batch_size(data)
    sums, grams = example_sums(model, sample), batch_grams(model, sample, size)
    inverted = of_batches(grams, size, len(sample.labels))
    found = {**accuracies(model, data), **of_examples(sums)}
    for batches in SUBSAMPLES:
        found |= of_subsamples(sums["whole"], grams["whole"], size, batches)
    return {**found, **{f"{name} inverted": value for name, value in inverted.items()}}


def measure_batches(model: nn.Module, data: Data) -> Measured:
    """Accuracies and m-coherence by way of mini-batches, where examples cannot be told apart."""
    sample, size = data.first(SAMPLE), batch_size(data)
    grams = batch_grams(model, sample, size)
    return {**accuracies(model, data), **of_batches(grams, size, len(sample.labels))}
