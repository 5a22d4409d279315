"""Robust gradients keep a network from learning wrong labels, plain ones do not."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import robust_training
from robust_training import METHODS, SWEPT, Data, late, noisy_digits, train

from pycoherence.demo import one_thread

EXAMPLES = 240
EPOCHS = 40


@pytest.fixture(scope="module")
def data():
    whole = noisy_digits()
    few = [tuple(part[:EXAMPLES] for part in batch) for batch in (whole.noisy, whole.true)]
    return Data(*few, whole.test)


@one_thread()
def trained(methods, data, batch_size, lr):
    """How well each method has learned in the end."""
    runs = {
        name: train(method, data, epochs=EPOCHS, batch_size=batch_size, lr=lr)
        for name, method in methods.items()
    }
    return {name: late(found) for name, found in runs.items()}


def test_half_of_the_labels_are_permuted():
    data = noisy_digits()
    noisy, true = data.noisy[1], data.true[1]
    assert noisy.bincount().tolist() == true.bincount().tolist()
    # Of the half that is permuted, one in ten keeps its label by chance.
    assert data.clean == pytest.approx(0.55, abs=0.03)


def test_the_more_a_rule_trims_the_less_is_memorised(data):
    end = trained(METHODS, data, batch_size=12, lr=0.05)
    fitted = {name: scores.noisy for name, scores in end.items()}
    assert fitted["SGD"] > 0.97
    assert fitted["SGD"] - 0.01 > fitted["RM3"] > fitted["MedianOfMeans(3)"] + 0.05
    for name in ("Winsorized(3)", "TrimmedMean(3)", "Winsorized(3), clipped"):
        assert fitted["MedianOfMeans(3)"] > fitted[name] + 0.2
        assert data.clean - 0.1 < fitted[name] < data.clean + 0.05
        assert end[name].test > end["SGD"].test + 0.1
        assert end[name].true > end["SGD"].true + 0.2


def test_medians_of_few_examples_memorise_little(data):
    end = trained(SWEPT, data, batch_size=3, lr=0.01)
    fitted = {name: scores.noisy for name, scores in end.items()}
    assert fitted["MedianOfMeans(3)"] == pytest.approx(data.clean, abs=0.08)
    assert data.clean < fitted["RM3"] < fitted["SGD"] - 0.2
    for name in ("SGD", "RA3"):  # nor does averaging more of them help
        assert fitted[name] > 0.9


def test_picture_and_tables(monkeypatch, tmp_path, capsys):
    for name in ("EPOCHS", "LATE"):
        monkeypatch.setattr(robust_training, name, 1)
    monkeypatch.setattr(robust_training, "BATCH_SIZES", (100, 200))
    robust_training.main(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in {**METHODS, **SWEPT})
