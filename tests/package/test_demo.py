import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.ranks import needs_gloo

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from pycoherence import demo, demo_picture

STEPS = 16
LAYERS = ["hidden1", "hidden2", "output"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo.run(steps=STEPS, seed=0, out=folder)
    return folder


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "coherence.json").read_text())


def test_writes_picture_and_data(out):
    assert {path.name for path in out.iterdir()} == {"coherence.json", "coherence.png"}
    assert (out / "coherence.png").read_bytes().startswith(b"\x89PNG")


def test_result_tells_how_it_was_made(result):
    settings = result["settings"]
    assert (settings["steps"], settings["seed"], settings["device"]) == (STEPS, 0, "cpu")
    assert settings["training_examples"] + settings["test_examples"] == 1797
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("kind", ["real", "random"])
def test_result_holds_every_measurement(result, kind):
    run = result["runs"][kind]
    steps = [at["step"] for at in run]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, STEPS)
    for at in run:
        assert list(at["modules"]) == ["network", *LAYERS]
        names = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
        assert list(at["parameters"]) == names
        network = at["modules"]["network"]
        assert network["m"] == pytest.approx(network["sum_sq_norm"] / network["total_sq_norm"])
        for key in ("sum_sq_norm", "total_sq_norm"):
            parts = sum(part[key] for part in at["parameters"].values())
            assert network[key] == pytest.approx(parts)


def test_both_start_alike_and_real_labels_agree_more(result):
    real, random = result["runs"]["real"], result["runs"]["random"]
    assert real[0]["test_accuracy"] == random[0]["test_accuracy"]
    for part in ("network", *LAYERS):
        pairs = zip(demo_picture.ms(real, part), demo_picture.ms(random, part), strict=True)
        assert all(a > 5 * b for a, b in pairs)
    assert real[-1]["test_accuracy"] > 0.6
    assert random[-1]["test_accuracy"] < 0.25


def test_seed_fixes_all_numbers(out, tmp_path):
    demo.run(steps=STEPS, seed=0, out=tmp_path)
    again = (tmp_path / "coherence.json").read_text()
    assert again == (out / "coherence.json").read_text()
    demo.run(steps=STEPS, seed=1, out=tmp_path)
    other = json.loads((tmp_path / "coherence.json").read_text())
    assert other["runs"]["real"][0] != json.loads(again)["runs"]["real"][0]


def test_one_step_is_enough_and_leaves_the_threads_alone(tmp_path, capsys):
    threads = torch.get_num_threads()
    demo.run(steps=1, out=tmp_path)
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for word in ("real", "random", "network", *LAYERS, "coherence.png", "coherence.json"):
        assert word in printed


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_what_one_finds(processes, result, tmp_path):
    """Up to rounding in float32; batches of 100 and 1347 images are not divided evenly by three."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "-m", "pycoherence", "demo", "--distributed"]
    options = ["--steps", str(STEPS), "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    found = json.loads((tmp_path / "coherence.json").read_text())
    expected = {**result["settings"], "processes": processes}
    assert found["settings"] == expected
    for kind, run in result["runs"].items():
        for ours, theirs in zip(found["runs"][kind], run, strict=True):
            for part in ("modules", "parameters"):
                for name, numbers in theirs[part].items():
                    assert ours[part][name] == pytest.approx(numbers, rel=1e-5), (kind, name)


def test_processes_that_torchrun_has_not_started_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(demo, "fit", lambda *args: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match=r"expected RANK in the environment.*run torchrun --nproc"):
        demo.run(out=tmp_path, distributed=True)


def test_random_labels_are_a_permutation(monkeypatch, tmp_path):
    seen = []
    fit = demo.fit
    monkeypatch.setattr(demo, "fit", lambda *args: seen.append(args[1][1]) or fit(*args))
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    demo.run(steps=1, out=tmp_path)
    real, random = seen
    assert torch.equal(real.bincount(), random.bincount())
    assert not torch.equal(real, random)


def test_picture_can_be_redrawn(result, tmp_path):
    demo_picture.draw(result, tmp_path / "again.svg")
    drawn = (tmp_path / "again.svg").read_text()
    assert "<svg" in drawn


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps to be at least 1, got 0"),
        ({"seed": -1}, "seed to be in"),
        ({"device": "abacus"}, "device .* got 'abacus'"),
        ({"device": "meta"}, "device .* got 'meta'"),
    ],
)
def test_bad_settings_are_refused_before_training(setting, message, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fit", lambda *args: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match=message):
        demo.run(**{"steps": 1, "out": tmp_path, **setting})


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_out_must_be_a_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fit", lambda *args: pytest.fail("training has begun"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out to be a folder to write to"):
        demo.run(out=tmp_path / place)


@pytest.mark.parametrize("missing", ["matplotlib.axes", "sklearn", "rich.console", "tqdm"])
def test_missing_extra_is_one_line(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("pycoherence.demo", "pycoherence.demo_picture", "pycoherence.plot"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("pycoherence.demo")
    message = str(caught.value)
    assert missing in message
    assert "pip install matplotlib rich scikit-learn tqdm" in message
    assert "\n" not in message


def test_the_package_itself_needs_no_extra(tmp_path: Path):
    code = (
        "import sys, pycoherence; "
        "print({'matplotlib', 'sklearn', 'rich', 'pycoherence.demo'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "set()"
