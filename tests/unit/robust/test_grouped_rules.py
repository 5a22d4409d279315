"""Rules over groups of rows against the papers' formulas, on the gradients of each group."""

from collections.abc import Callable

import pytest
from support import plain_rules as plain
from support.models import MODELS
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor

import pycoherence as pc

RULES: dict[str, tuple[Callable[[], object], Callable[[Tensor], Tensor]]] = {
    "winsorized": (lambda: pc.Winsorized(1), plain.coordinates("winsorized_mean", 1)),
    "median-of-means": (lambda: pc.MedianOfMeans(3), plain.coordinates("median_of_means", 3)),
    "krum": (lambda: pc.Krum(1, 2), lambda g: plain.krum(g, 1, 2)),
    "bulyan": (lambda: pc.Bulyan(0), lambda g: plain.bulyan(g, 0)),
    "norm-clip": (lambda: pc.NormClip(0.4), lambda g: plain.norm_clip(g, 0.4)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_as_in_the_paper(name: str, rule: str, reduction: str) -> None:
    model, batch = larger(name)
    batch, groups = tuple(x[: B // 2 * 2] for x in batch), B // 2
    ours, truth = RULES[rule]
    expected = plain.over_network(gradients(model, batch, reduction, 2), truth)
    if reduction == "sum":
        expected = {n: x * groups for n, x in expected.items()}
    found, report = aggregated(model, batch, ours(), reduction, group_size=2)
    assert report.batch_size == groups
    assert_gradients(found, expected, 1e-11)
