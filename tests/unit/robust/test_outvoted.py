"""Who was outvoted, against gradients taken one at a time."""

from typing import Any

import pytest
import torch
from support.models import MODELS
from support.raising import raising
from support.settings import workspace
from support.steps import B, aggregated, gradients, larger
from torch import Tensor, nn

import pycoherence as pc


def kept(values: list[float], rule: Any) -> tuple[float, float]:
    """The lowest and the highest value that a rule leaves as it is."""
    ordered, n, k = sorted(values), len(values), rule.k
    if isinstance(rule, (pc.Winsorized, pc.TrimmedMean)):
        inner = ordered[k : n - k]
    else:
        trimmed = ordered[k : n - k]
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        centre = sum(trimmed) / len(trimmed) if isinstance(rule, pc.Phocas) else middle
        inner = sorted(ordered, key=lambda v: (abs(v - centre), v))[: n - k]
    return min(inner), max(inner)


def truth(rows: Tensor, rule: Any) -> Tensor:
    """In how many coordinates each row is outvoted."""
    counts = torch.zeros(len(rows), dtype=torch.float64)
    for column in rows.flatten(1).T.tolist():
        low, high = kept(column, rule)
        counts += torch.tensor([not low <= v <= high for v in column])
    return counts


RULES = [pc.Winsorized(2), pc.TrimmedMean(3), pc.Phocas(2), pc.MeaMed(4)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_shares(name: str, rule: Any) -> None:
    model, batch = larger(name)
    rows = gradients(model, batch)
    with workspace(2**12):
        _, report = aggregated(model, batch, rule, outvoted=True)
    expected = {n: truth(g, rule) for n, g in rows.items()}
    for n, g in rows.items():
        found = report.by_parameter[n].outvoted
        torch.testing.assert_close(found, expected[n] / g[0].numel())
    total = sum(expected.values()) / sum(g[0].numel() for g in rows.values())
    torch.testing.assert_close(report.outvoted, total)


def test_words_that_few_have() -> None:
    """Most examples have a zero in a rare word's row, so that those with another are outvoted."""
    model, batch = larger("transformer")
    rows = gradients(model, batch)
    _, report = aggregated(model, batch, pc.Winsorized(2), outvoted=True)
    for name in ("token.weight", "position.weight", "blocks.0.norm1.weight", "head.bias"):
        found = report.by_parameter[name].outvoted
        expected = truth(rows[name], pc.Winsorized(2)) / rows[name][0].numel()
        torch.testing.assert_close(found, expected)


class Shared(nn.Module):
    """A tied table, slices of a weight, and one that is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.weight = nn.Parameter(torch.randn(12, 6))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) @ self.weight[:6]
        return self.spectral(x).tanh().mean(1) @ self.table.weight.T[:, 1:8]


@pytest.mark.parametrize("room", [1, 2**20])
def test_all_kinds_of_sites(room: int) -> None:
    torch.manual_seed(0)
    model = Shared().double().eval()
    batch = torch.randint(9, (B, 4)), torch.randint(7, (B,))
    rows = gradients(model, batch)
    with workspace(room):
        _, report = aggregated(model, batch, pc.Winsorized(2), outvoted=True)
    for name, g in rows.items():
        found = report.by_parameter[name].outvoted * g[0].numel()
        # Rounding decides where examples are equal, such as in a row of the table.
        equal = (g.flatten(1).sort(0).values.diff(dim=0).abs() < 1e-12).any(0).sum()
        assert (found - truth(g, pc.Winsorized(2))).abs().max() <= equal


def test_equal_values_are_not_outvoted() -> None:
    model = nn.Linear(1, 1, bias=False)
    with pc.aggregate(model, pc.Winsorized(1), outvoted=True) as agg:
        model(torch.tensor([[1.0], [1.0], [1.0], [1.0], [9.0]])).mean().backward()
    assert agg.report.outvoted.tolist() == [0, 0, 0, 0, 1]


def test_groups_of_rows() -> None:
    model, (inputs, labels) = larger("mlp")
    batch = inputs[:10], labels[:10]
    rows = gradients(model, batch, group_size=2)
    _, report = aggregated(model, batch, pc.Winsorized(1), outvoted=True, group_size=2)
    found = report.by_parameter["0.weight"].outvoted
    torch.testing.assert_close(found, truth(rows["0.weight"], pc.Winsorized(1)) / (11 * 13))


def test_not_finite() -> None:
    model, (inputs, labels) = larger("mlp")
    inputs[2, 0] = torch.nan
    rule = pc.Winsorized(2)
    _, report = aggregated(model, (inputs, labels), rule, outvoted=True)
    assert report.outvoted.isnan().all()
    _, report = aggregated(model, (inputs, labels), rule, outvoted=True, nonfinite="drop")
    assert report.outvoted[2] == 1
    others = [b for b in range(B) if b != 2]
    rows = gradients(model, (inputs[others], labels[others]))
    counts = sum(truth(g, rule) for g in rows.values())
    numbers = sum(g[0].numel() for g in rows.values())
    torch.testing.assert_close(report.outvoted[others], counts / numbers)


def test_a_wrong_label_is_outvoted() -> None:
    model, (inputs, labels) = larger("mlp")
    inputs, labels = inputs[:1] + 0.1 * inputs, labels[:1].repeat(B)
    labels[4] = (labels[4] + 1) % 7
    _, report = aggregated(model, (inputs, labels), pc.Winsorized(1), outvoted=True)
    assert report.outvoted.argmax() == 4


def test_only_on_request_and_as_plain_data() -> None:
    model, batch = larger("mlp")
    _, report = aggregated(model, batch, pc.Winsorized(2))
    assert report.outvoted is None
    assert report.by_parameter["0.bias"].outvoted is None
    _, report = aggregated(model, batch, pc.Winsorized(2), outvoted=True)
    assert report.to_dict()["outvoted"] == report.outvoted.tolist()
    assert "outvoted" in str(report)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_same(name: str) -> None:
    model, batch = larger(name)
    plain, _ = aggregated(model, batch, pc.Winsorized(2))
    found, _ = aggregated(model, batch, pc.Winsorized(2), outvoted=True)
    assert all(torch.equal(g, plain[n]) for n, g in found.items())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_vectors(rule: Any) -> None:
    rows = torch.randn(B, 4, 5, dtype=torch.float64)
    _, report = rule.with_report({"a": rows, "b": rows[:, 0]}, outvoted=True)
    counts = truth(rows, rule), truth(rows[:, 0], rule)
    torch.testing.assert_close(report.by_parameter["a"].outvoted, counts[0] / 20)
    torch.testing.assert_close(report.outvoted, sum(counts) / 25)
    assert rule.with_report(rows)[1].outvoted is None
    empty = rule.with_report({"a": rows, "none": rows[:, :, :0]}, outvoted=True)[1]
    torch.testing.assert_close(empty.outvoted, counts[0] / 20)
    assert not empty.by_parameter["none"].outvoted.any()
    assert rule.with_report(rows[:0], outvoted=True)[1].outvoted is None


MODEL = nn.Linear(2, 1)
test_values = raising(
    ValueError,
    {
        "median": (
            lambda: pc.aggregate(MODEL, pc.Median(), outvoted=True),
            "Winsorized, TrimmedMean, Phocas or MeaMed, got Median",
        ),
        "krum": (
            lambda: pc.aggregate(MODEL, pc.Krum(1), outvoted=True),
            "got Krum.*; of a rule over whole examples the report has the weights",
        ),
        "vectors": (
            lambda: pc.GAF(1.0).with_report(torch.ones(3, 2), outvoted=True),
            "Phocas or MeaMed, got GAF",
        ),
    },
)
