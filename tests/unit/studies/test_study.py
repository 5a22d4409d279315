"""`python -m pycoherence study`: every study is found, runs, and leaves a report."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence import cli
from pycoherence.studies import command, papers, report
from pycoherence.studies.papers import coherent_gradients
from pycoherence.studies.papers.coherent_gradients import Scale

TINY = Scale((0.0, 0.5, 1.0), (8,), (0.0, 0.5), (8, 8), (0, 2), 1)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coherent_gradients, "Scale", lambda: TINY)
        assert cli.main(["study", "coherent-gradients", "--seeds", "2", "--out", str(folder)]) == 0
    return folder / "coherent-gradients"


def test_studies_are_the_files_of_papers():
    files = Path(papers.__file__).parent.glob("[!_]*.py")
    assert command.names() == sorted(path.stem.replace("_", "-") for path in files)
    for name in command.names():
        assert f"study {name}" in (ROOT / "docs/studies.md").read_text(), name


def test_help_names_every_study_and_its_paper(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    text = capsys.readouterr().out
    for name in command.names():
        assert re.search(rf"\n  {name}\n      \S.*arXiv:\d{{4}}\.\d{{5}}", text), name


def test_the_overview_has_every_claim_and_its_verdict():
    """In the words with which the sections begin theirs."""
    page = (ROOT / "docs/studies.md").read_text()
    table, verdicts, study = page.split("## What came out")[1].split("\n\n")[2], {}, ""
    for line in table.splitlines()[2:]:
        link, number, _, verdict = (cell.strip() for cell in line.strip("|").split("|"))
        study = link[1:].split("]")[0] or study
        verdicts[study, number] = verdict
    claims = {}
    for name in command.names():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for number, verdict in re.findall(r"\*\*Claim (\d+):[^*]*\*\*\s+(\w+)", section):
            claims[name, number] = verdict.lower()
    assert {key: verdict.split()[0] for key, verdict in verdicts.items()} == claims


@pytest.mark.slow
def test_report_has_tables_and_pictures(out):
    text = (out / "report.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert pictures == ["noise.png", "shares.png", "robust.png"]
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| 50% | k = 2 |" in text
    assert "seeds 2" in text
    assert "A rough look" not in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {10, 7, 8}


def test_results_hold_what_was_measured(out):
    results = json.loads((out / "results.json").read_text())
    assert results["settings"] == {"data": "digits", "device": "cpu", "seeds": 2, "quick": False}
    assert results["versions"]["torch"] == torch.__version__
    assert len(results["runs"]) == 2 * (3 + 2 * 4)
    for run in results["runs"]:
        for at in run["measured"]:
            assert at["f_pristine"] + at["f_corrupt"] == pytest.approx(1, abs=1e-4)
            assert at["null_low"] <= at["null"] <= at["null_high"]
    true, noisy = (results["runs"][i]["measured"] for i in (0, 2))
    assert (true[0]["true"], true[0]["corrupt"]) == (1, None)
    assert noisy[0]["true"] == pytest.approx(0.55, abs=0.03)
    # The gradient is made of true labels from the start, and a null tag says nothing.
    assert noisy[0]["f_pristine"] > 0.85
    assert noisy[0]["null"] == pytest.approx(noisy[0]["true"], abs=0.05)


def test_a_second_time_nothing_is_trained(out, monkeypatch):
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(coherent_gradients, "Scale", lambda: TINY)
    monkeypatch.setattr("pycoherence.studies.runs.Training", None)
    command.run("coherent-gradients", seeds=2, out=out.parent)
    assert (out / "results.json").read_bytes() == before


def test_all_runs_every_study(monkeypatch, tmp_path):
    seen = []
    for name in command.names():
        module = importlib.import_module(f"{papers.__name__}.{name.replace('-', '_')}")
        monkeypatch.setattr(
            module, "study", lambda settings: (seen.append(settings), report.Report("Title"))[1]
        )
    assert cli.main(["study", "all", "--quick", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == command.names()
    assert all(settings.quick and settings.seeds == 1 for settings in seen)


def test_a_rough_look_at_a_folder(monkeypatch, tmp_path, capsys):
    """The whole command on data that is not digits."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 60), ("test", 5)):
        (tmp_path / part).mkdir()
        for name in ("cat", "dog"):
            images = torch.randn(count, 3, 9, 9, generator=generator)
            numpy.save(tmp_path / part / f"{name}.npy", images.numpy())
    monkeypatch.setattr(coherent_gradients, "QUICK", TINY)
    monkeypatch.setattr(command, "QUICK_EXAMPLES", 110)
    command.run("coherent-gradients", data=str(tmp_path), quick=True, out=tmp_path / "out")
    about = "110 images to train on and 10 to test on, each [3, 9, 9], in 2 classes"
    assert about in capsys.readouterr().out
    assert "A rough look" in (tmp_path / "out/coherent-gradients/report.md").read_text()
    results = json.loads((tmp_path / "out/coherent-gradients/results.json").read_text())
    assert {run["measured"][-1]["step"] for run in results["runs"]} == {1}  # one batch of 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected one of .*coherent-gradients.* or all, got 'nonsense'"),
        (["all", "--seeds", "0"], "at least one seed, got 0"),
        (["all", "--device", "abacus"], "device .* got 'abacus'"),
        (["all", "--data", "mnist", "--root", "nowhere"], "mnist in nowhere.*--download"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *arguments])
    assert re.search(f"study: .*{message}", str(stop.value))
    assert not [*tmp_path.iterdir()]


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"study: expected .*file/coherent-gradients to be a fol"):
        cli.main(["study", "coherent-gradients", "--out", str(tmp_path / "file")])


def test_out_must_be_writable(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match=r"to write to \(Permission denied\); .* --out"):
        cli.main(["study", "coherent-gradients", "--out", str(tmp_path)])


def test_stopping_is_no_error(monkeypatch, tmp_path, capsys):
    def stop(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(coherent_gradients, "study", stop)
    assert cli.main(["study", "coherent-gradients", "--out", str(tmp_path)]) == 130
    assert "goes on from here" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["matplotlib.figure", "tqdm"])
def test_missing_extra_is_one_line(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith("pycoherence.studies")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["pycoherence"], "studies")
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "coherent-gradients", "--out", str(tmp_path)])
    assert missing in str(stop.value)
    assert "pip install matplotlib rich scikit-learn tqdm" in str(stop.value)


def test_a_share_that_a_seed_lacks_is_none_of_all():
    some, none = [{"step": 1, "corrupt": 0.5}], [{"step": 1, "corrupt": None}]
    assert report.late_shares([some, some], "corrupt") == "50.0 ± 0.0%"
    assert report.late_shares([none, some], "corrupt") == "-"
    assert report.late_shares([some, none], "corrupt") == "-"


@pytest.mark.parametrize(("values", "text"), [([0.5], "50.0%"), ([0.5, 0.6, 0.4], "50.0 ± 10.0%")])
def test_numbers_in_tables(values, text):
    assert report.percent(values) == text
