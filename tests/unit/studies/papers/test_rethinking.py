"""Zhang et al. 2017: what is trained on what, what is measured, and a rough look at it all."""

import pytest
import torch
from support.oracle import m_coherence, per_example_gradients

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence.studies import gradients
from pycoherence.studies.data import Data, load
from pycoherence.studies.models import MLP
from pycoherence.studies.papers import rethinking
from pycoherence.studies.papers.rethinking import KINDS, QUICK, Case, Scale
from pycoherence.studies.settings import Settings


@pytest.fixture(scope="module")
def data():
    return load().first(200)


def number(cell):
    return float(cell.rstrip("%"))


@pytest.mark.slow
def test_random_labels_and_images_are_fitted_and_only_what_is_true_generalises(quick):
    rows = {(row[0], row[1]): row for row in quick.rows("network")}
    fitted = {kind: number(rows["MLP", kind][8]) for kind in KINDS}
    test = {kind: number(rows["MLP", kind][9]) for kind in KINDS}
    assert min(fitted.values()) > 80
    for kind in ("true labels", "shuffled pixels"):
        assert test[kind] > 85
    for kind in ("random labels", "random pixels", "Gaussian images"):
        assert test[kind] < 30
    assert test["random labels"] < test["half of them random"] < test["true labels"]
    half = {kind: number(rows["MLP", kind][2]) for kind in KINDS}
    assert half["true labels"] < half["Gaussian images"] < half["random labels"]
    m = {kind: number(rows["MLP", kind][6]) for kind in KINDS}
    assert m["true labels"] > 2 * m["random labels"]


@pytest.mark.slow
def test_the_construction_fits_everything_and_knows_nothing(quick):
    rows = quick.rows("targets")
    assert [row[0] for row in rows] == ["true labels", "random labels", "normal numbers"]
    for row in rows:
        assert (row[1], row[2]) == ("300", str(2 * 300 + 64))
        assert number(row[3]) == 100
        assert float(row[4]) < 1e-6
        assert number(row[5]) < 40
    assert len(quick.results["finite_sample"]) == 3


def test_other_images_and_classes(tmp_path):
    """Colours, two classes, a size of no power of two; and hardly a step, so that nothing fits."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(70, 3, 7, 5, generator=generator)
    labels = torch.arange(70) % 2
    data = Data("noise", images[:50], labels[:50], labels[:50], images[50:], labels[50:], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rethinking, "QUICK", Scale((6,), 1, (4, 8), 1, (), ("none", "all"), 40, 3))
        report = rethinking.study(Settings(data, 1, True, tmp_path))
    report.write(tmp_path, {})
    assert "| never |" in (tmp_path / "report.md").read_text()


def test_nothing_is_planned_twice_and_settings_do_not_depend_on_the_data(data):
    for scale in (QUICK, Scale()):
        cases = rethinking.cases(scale)
        assert len(cases) == len({*cases})
        for network in ("MLP", "CNN"):
            recipes = {
                repr(rethinking.recipe(case._replace(network=network), scale, data))
                for case, _, _ in KINDS.values()
            }
            assert len(recipes) == 1
    names = [rethinking.plan(case, scale, data, seed=0).name for case in cases]
    assert len(names) == len({*names})


def test_regularizers_are_what_they_say(data):
    found = {
        by: rethinking.recipe(Case(regularizer=by), Scale(), data) for by in Scale.regularizers
    }
    assert {by for by, recipe in found.items() if recipe.augment} == {"shifts", "all"}
    dropout = {by for by, recipe in found.items() if recipe.network.dropout}
    assert dropout == {"dropout", "all"}
    assert [recipe.weight_decay for recipe in found.values()] == [0, 5e-4, 5e-3, 0, 0, 5e-4]


def test_kinds_of_data_are_what_they_say(data):
    ruined = {kind: rethinking.ruined(case, data, 3) for kind, (case, _, _) in KINDS.items()}
    for kind, found in ruined.items():
        assert torch.equal(found.test_labels, data.test_labels)
        assert torch.equal(found.truth, data.truth)
        wrong = 1 - found.pristine.double().mean().item()
        share = {"half of them random": 0.45, "random labels": 0.9}.get(kind, 0)
        assert wrong == pytest.approx(share, abs=0.1 if share else 0)
    for kind in ("true labels", "random labels"):
        assert torch.equal(ruined[kind].images, data.images)
        assert torch.equal(ruined[kind].test_images, data.test_images)
    for kind in ("shuffled pixels", "random pixels"):
        for part in ("images", "test_images"):
            before, after = (getattr(d, part).flatten(1).sort() for d in (data, ruined[kind]))
            assert torch.equal(before.values, after.values)
            assert not torch.equal(before.indices, after.indices)
    # One permutation for both sets: a pixel of all images goes to the same place.
    both = torch.cat([data.images, data.test_images]).flatten(1).T.tolist()
    moved = torch.cat([ruined["shuffled pixels"].images, ruined["shuffled pixels"].test_images])
    assert sorted(both) == sorted(moved.flatten(1).T.tolist())
    gaussian = ruined["Gaussian images"]
    assert gaussian.images.mean().item() == pytest.approx(data.images.mean().item(), abs=0.05)
    assert not torch.equal(gaussian.images[:50], gaussian.test_images[:50])
    other = rethinking.ruined(KINDS["random pixels"][0], data, 4)
    assert not torch.equal(other.images, ruined["random pixels"].images)


def test_coherence_is_that_of_the_gradients(data):
    """Against the gradients of single examples, by autograd in float64."""
    data = data.first(30)
    torch.manual_seed(1)
    model = MLP((9,)).build(data)
    found = rethinking.measure(model, data)
    model.double()
    each = per_example_gradients(model, gradients.loss, (data.images, data.labels))
    assert found["m"] == pytest.approx(m_coherence(each), rel=1e-4)
    right = model(data.images.double()).argmax(1) == data.labels
    assert found["train"] == pytest.approx(right.double().mean().item())


def test_times_to_fit_are_those_of_the_first_step():
    def run(*shares):
        return [{"step": 10**i, "train": x, "m": 2.0 * i} for i, x in enumerate(shares)]

    true, slow = [run(0.5, 0.99, 1)], [run(0.1, 0.5, 0.995)]
    assert rethinking.fit_cells(true, true) == ["1", "10", "1.0"]
    assert rethinking.fit_cells(slow, true) == ["10", "100", "10.0"]
    assert rethinking.fit_cells([*slow, run(0.1, 0.2, 0.3)], true * 2) == ["never", "never", "-"]
    # There is no ratio to what is fitted before the first step, or never.
    at_once = [[{"step": 0, "train": 1.0}]]
    assert rethinking.fit_cells(true, at_once) == ["1", "10", "-"]
    assert rethinking.fit_cells(true, [run(0.1, 0.2, 0.3)]) == ["1", "10", "-"]
    assert rethinking.m_cells(slow) == ["0.0", "2.0", "4.0"]
    assert rethinking.m_cells([run(0.1, 0.2)]) == ["0.0", "never", "2.0"]


def test_equal_points_count_once(data):
    doubled = data.take(torch.arange(60) % 30)
    found = rethinking.constructed("true labels", doubled, seed=0)
    assert (found["points"], found["weights"]) == (30, 2 * 30 + 64)


def test_the_construction_on_data_it_cannot_fit(data):
    """Equal images with different labels."""
    images = data.images[:1].expand(200, -1, -1, -1)
    same = rethinking.replace(data, images=images)
    report = rethinking.Report("Title")
    rethinking.report_finite_sample(report, same, seeds=1)
    assert report.results["finite_sample"] == []
    assert "Not for random labels: expected equal points" in "".join(report._parts)
