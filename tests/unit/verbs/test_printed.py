"""Results print as short tables, and give plain data to files."""

import json

import pytest
import torch
from torch import nn

import pycoherence as pc

ROWS = 16
NUMBERS = ("m", "alpha", "unbiased_alpha", "noise_scale")


def deep(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum(1).mean()


def coherence_of(model: nn.Module, rows: int = 5) -> pc.Coherence:
    with pc.collect(model, pc.SqNorms()) as record:
        loss_fn(model, torch.randn(rows, 3)).backward()
    return record.coherence()


def report_of(model: nn.Module, rule, rows: int = 8) -> pc.Report:
    with pc.aggregate(model, rule) as agg:
        loss_fn(model, torch.randn(rows, 3)).backward()
    return agg.report


def aligned(lines: list[str]) -> bool:
    return len({len(line) for line in lines}) == 1


def test_a_coherence_prints_network_modules_and_parameters() -> None:
    c = coherence_of(deep(2))
    title, header, *rows = str(c).splitlines()
    assert title == "Coherence of 5 examples"
    assert header.split() == list(NUMBERS)
    assert [row.split()[0] for row in rows] == [
        "network", "modules", "0", "1", "parameters", *c.by_parameter,
    ]  # fmt: skip
    assert rows[0].split()[1:] == [f"{getattr(c, number):.4g}" for number in NUMBERS]
    assert aligned([header, *(row for row in rows if len(row.split()) > 1)])
    assert repr(c) == f"Coherence(m={c.m:.4g}, n=5, parameters=4, modules=2)"
    assert repr(c.by_module["0"]) == f"Coherence(m={c.by_module['0'].m:.4g}, n=5)"


def test_long_models_are_cut() -> None:
    c = coherence_of(deep(ROWS))
    rows = str(c).splitlines()
    assert "more" not in "".join(rows[: rows.index("parameters")])
    assert rows[-1] == f"  ... {ROWS + 1} more"
    assert len(rows) == 3 + (1 + ROWS) + (1 + ROWS)
    assert len(str(coherence_of(deep(300))).splitlines()) == len(rows)


def test_long_names_keep_their_end() -> None:
    name = "base.model." * 8 + "weight"
    text = str(pc.Coherence.of({name: (1.0, 2.0)}, 3))
    assert max(map(len, text.splitlines())) < 100
    assert "..." in text
    assert "model.weight" in text


def test_a_coherence_without_numbers_prints() -> None:
    c = coherence_of(deep(1), rows=0)
    assert "nan" in str(c)
    assert json.loads(json.dumps(c.to_dict()))["n"] == 0


def test_a_coherence_becomes_plain_data() -> None:
    c = coherence_of(deep(2))
    found = json.loads(json.dumps(c.to_dict()))
    assert found == c.to_dict()
    assert set(found["by_parameter"]) == set(c.by_parameter)
    for part, each in [(c, found), (c.by_module["1"], found["by_module"]["1"])]:
        for number in (*NUMBERS, "sum_sq_norm", "total_sq_norm", "n"):
            assert each[number] == getattr(part, number)


def test_a_verification_prints_the_worst_first() -> None:
    found = pc.Verification({"a": 0.0, "b": 1e-3, "c": float("nan")}, dict.fromkeys("abc", 0.0), 1)
    title, header, *rows = str(found).splitlines()
    assert title == "Verification: 1 of 3 parameters beyond 1.0e+00"
    assert header.split() == ["sq_norms", "gradient"]
    assert [row.split()[0] for row in rows] == ["c", "b", "a"]
    assert repr(found) == "Verification(parameters=3, failures=1, rtol=1.0e+00)"
    assert json.loads(json.dumps(found.to_dict()))["failures"] == ["c"]


def test_verify_prints_that_all_is_well() -> None:
    found = pc.verify(deep(2), loss_fn, torch.randn(4, 3))
    assert str(found).startswith("Verification: all within ")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize("rule", [pc.Krum(1), pc.NormClip(0.1), pc.CenteredClip(0.1)], ids=repr)
def test_a_rule_over_the_network_prints_one_row(rule) -> None:
    report = report_of(deep(2), rule)
    title, header, row = str(report).splitlines()
    assert title == "Report on 8 examples, 4 parameters"
    assert row.split()[0] == "network"
    assert "weights" in header
    assert len(repr(report)) < 200
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize("rule", [pc.Winsorized(1), pc.SignAgreement(0.5)], ids=repr)
def test_a_rule_over_coordinates_prints_its_parameters(rule) -> None:
    report = report_of(deep(2), rule)
    _, _, *rows = str(report).splitlines()
    assert [row.split()[0] for row in rows] == list(report.by_parameter)
    assert aligned(rows)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_a_rule_that_reports_nothing_prints_one_line() -> None:
    assert str(report_of(deep(2), pc.Median())).count("\n") == 0


def test_many_chosen_are_cut() -> None:
    report = report_of(deep(1), pc.Krum(1, 6), rows=9)
    assert report.network is not None
    assert "... 2 more]" in str(report)
    assert "... 2 more]" in repr(report.network)
    assert len(report.to_dict()["network"]["chosen"]) == 6


def test_notebooks_show_the_table_and_no_markup_of_a_name() -> None:
    html = pc.Coherence.of({"<b>.weight": (1.0, 2.0)}, 3)._repr_html_()
    assert html.startswith("<pre>")
    assert "&lt;b&gt;.weight" in html
    assert "<b>" not in html


def test_gradients_that_vanish_or_cancel_print() -> None:
    for parts in [{"a": (0.0, 0.0)}, {"a": (0.0, 1.0)}, {"a": (4.0, 4.0)}]:
        c = pc.Coherence.of(parts, 2)
        assert len(str(c).splitlines()) == 5
        json.dumps(c.to_dict())
