"""`pc.plot` draws the numbers that it is given, shows nothing, and says what it cannot draw."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import pycoherence as pc

NUMBERS = ("m", "alpha", "unbiased_alpha", "noise_scale")


def deep(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))


def record_of(model: nn.Module, rows: int = 30) -> pc.Record:
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.randn(rows, 3)).square().sum(1).mean().backward()
    return record


def axes_of(figure: Figure) -> Axes:
    figure.canvas.draw()  # so that what cannot be laid out raises
    return figure.axes[0]


def bars_of(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def lines_of(figure: Figure) -> dict[str, list[float]]:
    lines = axes_of(figure).get_lines()
    return {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in lines}


def test_one_coherence_is_a_bar_for_each_layer() -> None:
    c = record_of(nn.Sequential(deep(2), nn.Linear(3, 2))).coherence()
    axes = axes_of(pc.plot.coherence(c))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["network", "0.0", "0.1", "1"]
    widths = [bar.get_width() for bar in bars_of(axes)]
    assert widths == [c.m, *(c.by_module[name].m for name in names[1:])]
    assert "30 examples" in axes.get_title("left")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_history_is_a_curve_for_each_layer(number: Any) -> None:
    model = deep(2)
    history = {step: record_of(model).coherence() for step in (0, 3, 10)}
    lines = lines_of(pc.plot.coherence(history, number=number))
    assert lines["network"] == [getattr(c, number) for c in history.values()]
    for name in ("0", "1"):
        assert lines[name] == [getattr(c.by_module[name], number) for c in history.values()]
    assert lines == lines_of(pc.plot.coherence(list(history.items()), number=number))
    counted = pc.plot.coherence(list(history.values()), number=number)
    assert lines == lines_of(counted)
    assert axes_of(counted).get_xlabel() == "measurement"


def test_parts_are_modules_or_parameters() -> None:
    c = record_of(deep(3)).coherence()
    lines = lines_of(pc.plot.coherence([c, c], parts=["2", "0.bias"]))
    assert lines["2"] == [c.by_module["2"].m] * 2
    assert lines["0.bias"] == [c.by_parameter["0.bias"].m] * 2
    assert "1" not in lines
    with pytest.raises(ValueError, match=r"such as 0\.weight, .*got 7, x"):
        pc.plot.coherence(c, parts=["0", "7", "x"])


def test_many_layers_are_a_map() -> None:
    c = record_of(deep(12)).coherence()
    for history in ({0: c, 5: c, 20: c}, [c]):
        axes = axes_of(pc.plot.coherence(history))
        (drawn,) = axes.collections
        values = drawn.get_array()
        assert values is not None
        assert values.shape == (13, len(history))
        assert values[0, 0] == c.m
        assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["network", "0"]


def test_very_many_layers_keep_their_labels_apart() -> None:
    c = pc.Coherence.of({f"layer{i}.weight": (2.0, 1.0) for i in range(90)}, 9)
    for history in (c, [c, c]):
        figure = pc.plot.coherence(history)
        assert figure.get_figheight() <= 12
        assert len(axes_of(figure).get_yticks()) <= 40


def test_layers_that_are_trained_later_begin_later() -> None:
    model = deep(2)
    whole = record_of(model).coherence()
    model[1].requires_grad_(False)
    part = record_of(model).coherence()
    lines = lines_of(pc.plot.coherence([part, whole]))
    assert math.isnan(lines["1"][0])
    assert lines["1"][1] == whole.by_module["1"].m


def test_one_record_is_a_histogram_of_all_its_examples() -> None:
    for record in (record_of(deep(1)), record_of(deep(1), rows=1)):
        axes = axes_of(pc.plot.norms(record))
        assert sum(bar.get_height() for bar in bars_of(axes)) == record.batch_size


def test_wide_norms_are_on_a_logarithmic_axis_and_all_are_there() -> None:
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[10.0**-k] for k in range(8)])
    with pc.collect(model, pc.SqNorms()) as record:
        model(x).mean().backward()
    axes = axes_of(pc.plot.norms(record))
    assert axes.get_xscale() == "log"
    assert sum(bar.get_height() for bar in bars_of(axes)) == 8


def test_norms_that_are_not_finite_are_counted() -> None:
    model, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [math.nan], [2.0]])
    with pc.collect(model, pc.SqNorms()) as record:
        model(x).mean().backward()
    axes = axes_of(pc.plot.norms(record))
    assert "1 not finite" in axes.get_title("left")
    assert sum(bar.get_height() for bar in bars_of(axes)) == 2


def test_several_records_are_quantiles_over_steps() -> None:
    model = deep(1)
    records = {step: record_of(model) for step in (0, 4)}
    lines = lines_of(pc.plot.norms(records))
    found = [record.scalars() for record in records.values()]
    assert lines == {
        "largest": [at["norm/max"] for at in found],
        "9 of 10 are below": [at["norm/q90"] for at in found],
        "median": [at["norm/median"] for at in found],
    }


def test_a_monitor_has_a_history_for_both() -> None:
    model = deep(2)
    monitor = pc.GradientMonitor(model, every=2)
    for _ in range(5):
        with monitor.micro_batch():
            model(torch.randn(6, 3)).square().sum(1).mean().backward()
        monitor.step()
    figure = pc.plot.coherence(monitor.history)
    assert lines_of(figure)["network"] == [at["coherence/m"] for at in monitor.history]
    assert np.asarray(axes_of(figure).get_lines()[0].get_xdata()).tolist() == [0, 2, 4]
    axes_of(pc.plot.coherence(monitor.history, number="noise_scale"))
    assert lines_of(pc.plot.norms(monitor.history))["median"] == [
        at["norm/median"] for at in monitor.history
    ]
    with pytest.raises(ValueError, match="a monitor's history has the network alone"):
        pc.plot.coherence(monitor.history, parts=["0"])
    with pytest.raises(ValueError, match="one that a monitor logs, got 'alpha'"):
        pc.plot.coherence(monitor.history, number="alpha")


def test_it_draws_into_axes_of_the_user() -> None:
    record = record_of(deep(2))
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert pc.plot.coherence(record.coherence(), axes=left) is figure
    assert pc.plot.norms([record, record], axes=right) is figure
    assert left.patches
    assert right.get_lines()


def test_numbers_that_are_no_numbers_are_drawn_as_gaps() -> None:
    nothing = pc.Coherence.of({"a.weight": (0.0, 0.0), "b.weight": (1e-300, 0.0)}, 4)
    for history in (nothing, [nothing, nothing]):
        for number in NUMBERS:
            axes_of(pc.plot.coherence(history, number=number))


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: pc.plot.coherence([]), ValueError, "one or more steps, got an empty one"),
        (lambda: pc.plot.norms({}), ValueError, "one or more steps, got an empty one"),
        (lambda: pc.plot.coherence(3), TypeError, "a sequence of them.*got int"),
        (lambda: pc.plot.coherence([3]), TypeError, r"a pc\.Coherence.*got int"),
        (lambda: pc.plot.coherence([{"loss": 1.0}]), TypeError, "got a dict with loss"),
        (lambda: pc.plot.norms([3]), TypeError, r"a pc\.Record.*got int"),
        (lambda: pc.plot.norms([{"loss": 1.0}]), ValueError, "norm/max.*measure"),
        (
            lambda: pc.plot.coherence([], number="M"),  # pyright: ignore
            ValueError,
            "number to be one of.*got 'M'",
        ),
    ],
)
def test_other_things_are_refused(draw: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        draw()


def test_pyplot_is_not_imported_and_matplotlib_only_when_it_is_needed() -> None:
    code = (
        "import sys, pycoherence as pc; before = 'matplotlib' in sys.modules; "
        "pc.plot.coherence(pc.Coherence(1.0, 1.0, 2)); "
        "print(before, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pycoherence.plot", raising=False)
    monkeypatch.delattr(pc, "plot", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs matplotlib.*pip install matplotlib"):
        _ = pc.plot.coherence
