"""Chatterjee and Zielinski 2022: what the command finds at a rough look."""

import numpy
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence.studies import courses
from pycoherence.studies.papers import generalization_mystery


@pytest.mark.slow
def test_what_is_true_is_coherent_and_learned(quick):
    assert quick.results["settings"]["quick"]
    runs = {run["name"]: run["measured"] for run in quick.results["runs"]}
    assert len(runs) == 6
    for network in ("mlp", "resnet", "batchnorm-resnet"):
        true, random = (runs[f"{network}-{noise}-seed0"] for noise in (0, 100))
        if network != "resnet":  # which is about as coherent with random labels
            assert courses.until(true, 0.5) > 1.5 * courses.until(random, 0.5)
        assert true[-1]["test"] > 0.6
        assert random[-1]["test"] < 0.4
        for at in (*true, *random):
            for part in ("whole", *generalization_mystery.PARTS):
                assert at[f"{part} low"] <= at[part] <= at[f"{part} high"]


@pytest.mark.slow
def test_mini_batches_tell_what_examples_do(quick):
    for run in quick.results["runs"]:
        if not run["name"].startswith("batchnorm"):
            every = run["measured"]
            ratios = [at["whole inverted"] / at["whole"] for at in every]
            assert numpy.median(ratios) == pytest.approx(1, abs=0.25)
            # The fewer examples, the larger alpha with the diagonal; about 1/n too large.
            excess = [at["plain 100"] - at["free 100"] for at in every]
            assert numpy.mean(excess) == pytest.approx(0.01, rel=0.1)


@pytest.mark.slow
def test_tables_name_every_network_and_kind_of_labels(quick):
    rows = quick.rows("network | labels | M at first")
    assert [row[:2] for row in rows] == [
        [network, labels]
        for network in ("MLP", "ResNet", "BatchNorm ResNet")
        for labels in ("true", "random")
    ]
    assert [row[0] for row in quick.rows("of | M until half fitted")] == [
        *("MLP", "ResNet", "BatchNorm ResNet", "all")
    ]
