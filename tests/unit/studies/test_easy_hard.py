"""Easy and hard examples: as many of each, none here and there, tested on what they say."""

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from pycoherence.studies import easy_hard, measures
from pycoherence.studies.data import load
from pycoherence.studies.models import MLP


@pytest.fixture(scope="module")
def data():
    """A pixel of each image tells which it is."""
    found = load().first(400)
    found.images[:, 0, 0, 0] = torch.arange(400)
    return found


@pytest.fixture(scope="module")
def right(data):
    """More than half, and the more so the higher the class."""
    torch.manual_seed(0)
    return measures.marks(torch.rand(400) < 0.2 + 0.08 * data.labels)


def who(images):
    return images[:, 0, 0, 0].long().tolist()


def test_easy_is_told_at_half_way():
    run = [{"step": i, "train": train} for i, train in enumerate((0.1, 0.4, 0.6, 0.3, 0.9))]
    assert easy_hard.half_way(run)["step"] == 2
    assert easy_hard.half_way(run[:2])["step"] == 1


@pytest.mark.parametrize("alike", [False, True])
def test_sets_are_of_a_size_and_apart(alike, data, right):
    sets = easy_hard.divide(data, right, alike=alike, seed=3)
    assert list(sets) == ["easy", "hard", "random"]
    trained = {i for each in sets.values() for i in who(each.images)}
    tested = {i for each in sets.values() for i in who(each.test_images)}
    assert not trained & tested
    for each in sets.values():
        assert len(set(who(each.images))) == len(sets["easy"].labels) > 70
        assert len(set(who(each.test_images))) == len(sets["easy"].test_labels) > 15
        assert each.labels.tolist() == data.labels[who(each.images)].tolist()
        assert each.test_labels.tolist() == data.labels[who(each.test_images)].tolist()
    for kind, mark in (("easy", "1"), ("hard", "0")):
        chosen = who(sets[kind].images) + who(sets[kind].test_images)
        assert {right[i] for i in chosen} == {mark}
    counts = [torch.bincount(each.labels, minlength=10).tolist() for each in sets.values()]
    assert (counts[0] == counts[1] == counts[2]) == alike


def test_the_seed_chooses(data, right):
    a, b, c = (easy_hard.divide(data, right, alike=False, seed=seed) for seed in (0, 0, 1))
    assert who(a["hard"].images) == who(b["hard"].images) != who(c["hard"].images)


def test_all_hard_is_refused(data):
    with pytest.raises(ValueError, match="got 0 easy ones of 400; use a larger data set"):
        easy_hard.divide(data, "0" * 400, alike=False, seed=0)


def test_accuracies_are_those_on_each_test_set(data, right):
    sets = easy_hard.divide(data, right, alike=True, seed=0)
    torch.manual_seed(1)
    model = MLP((9,)).build(data)
    joint = easy_hard.tested_on_all(sets, data)
    for kind, each in joint.items():
        assert who(each.images) == who(sets[kind].images)
    history = [{"step": 4, **easy_hard.tests(model, joint["hard"])}]
    ((found,),) = easy_hard.tested([sets], {"hard": [history]})["hard"]
    expected = {
        kind: measures.share(measures.correct(model, each.test_images, each.test_labels))
        for kind, each in {**sets, "original": data}.items()
    }
    hard = sets["hard"]
    expected["train"] = measures.share(measures.correct(model, hard.images, hard.labels))
    assert found == {"step": 4, **expected}


def test_coherences_are_those_of_each_kind(data, right):
    sets = easy_hard.divide(data, right, alike=False, seed=0)
    both = easy_hard.together(sets)
    torch.manual_seed(1)
    model = MLP((9,)).build(data)
    found = easy_hard.coherences(model, both)
    for kind in ("easy", "hard"):
        each = sets[kind]
        assert found[kind] == measures.coherence(model, each.images, each.labels).m
    mixed = [*range(0, len(both.labels), 2)]
    assert found["random"] == pytest.approx(
        measures.coherence(model, both.images[mixed], both.labels[mixed]).m
    )


def test_new_networks_learn_for_as_many_steps(data, right):
    sets = [easy_hard.divide(data, right, alike=False, seed=seed) for seed in (0, 1)]
    settings = easy_hard.Settings(data, 2, True, None)
    plans = easy_hard.plan_sets(settings, MLP((5,)), 7, {False: sets})
    assert list(plans) == [(kind, False) for kind in ("easy", "hard", "random", "together")]
    assert {run.recipe.steps for runs in plans.values() for run in runs} == {7 * 4}
    assert [run.seed for run in plans["easy", False]] == [1000, 1001]
    assert len({run.name for runs in plans.values() for run in runs}) == 8
