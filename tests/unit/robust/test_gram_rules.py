"""Rules over whole examples against the papers' formulas, on gradients taken one at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import plain_rules as plain
from support.models import MODELS
from support.oracle import joined
from support.raising import raising
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn

import pycoherence as pc

RULES: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "krum": (lambda per: pc.Krum(2, per=per), lambda g: plain.krum(g, 2)),
    "multi-krum": (lambda per: pc.Krum(4, 3, per=per), lambda g: plain.krum(g, 4, 3)),
    "bulyan": (lambda per: pc.Bulyan(2, per=per), lambda g: plain.bulyan(g, 2)),
    "bulyan-1": (lambda per: pc.Bulyan(1, per=per), lambda g: plain.bulyan(g, 1)),
    "bulyan-0": (lambda per: pc.Bulyan(0, per=per), lambda g: plain.bulyan(g, 0)),
    "geometric-median": (
        lambda per: pc.GeometricMedian(per=per),
        lambda g: plain.geometric_median(g, 100, 1e-6, 1e-6),
    ),
    "geometric-median-4": (
        lambda per: pc.GeometricMedian(4, nu=0.1, tolerance=0, per=per),
        lambda g: plain.geometric_median(g, 4, 0.1, 0),
    ),
    "centered-clip": (
        lambda per: pc.CenteredClip(0.3, per=per),
        lambda g: plain.centered_clip(g, torch.zeros(g.shape[1], dtype=g.dtype), 0.3, 1),
    ),
    "centered-clip-3": (
        lambda per: pc.CenteredClip(0.3, 3, per=per),
        lambda g: plain.centered_clip(g, torch.zeros(g.shape[1], dtype=g.dtype), 0.3, 3),
    ),
    "norm-clip": (lambda per: pc.NormClip(0.4, per=per), lambda g: plain.norm_clip(g, 0.4)),
    "auto-clip": (
        lambda per: pc.AutoClip(0.4, per=per, gamma=0.1),
        lambda g: plain.auto_clip(g, 0.4, 0.1),
    ),
    "gaf": (lambda per: pc.GAF(0.9, per=per), lambda g: plain.gaf(g, 0.9)),
    "mda": (lambda per: pc.MDA(3, per=per), lambda g: plain.mda(g, 3)),
    "smea": (lambda per: pc.SMEA(3, per=per), lambda g: plain.smea(g, 3)),
    "monna": (
        lambda per: pc.MoNNA(4, 2, per=per),
        lambda g: plain.monna(g, 4, 2 if len(g) == B else 1),
    ),
    "nnm-krum": (
        lambda per: pc.NNM(3, pc.Krum(3, 2, per=per)),
        lambda g: plain.krum(plain.nearest_mixed(g, 3), 3, 2),
    ),
    "arc-nnm-geometric-median": (
        lambda per: pc.ARC(2, pc.NNM(3, pc.GeometricMedian(4, nu=0.1, tolerance=0, per=per))),
        lambda g: plain.geometric_median(plain.nearest_mixed(plain.arc(g, 2), 3), 4, 0.1, 0),
    ),
}
PER = {"network": plain.over_network, "parameter": plain.by_parameter}


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_as_in_the_paper(name: str, rule: str, per: str) -> None:
    model, batch = larger(name)
    ours, truth = RULES[rule]
    expected = PER[per](gradients(model, batch), truth)
    found, _ = aggregated(model, batch, ours(per))
    assert_gradients(found, expected, 1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_factors_that_all_examples_share(rule: str) -> None:
    """The direction of a spectral norm, and the statistics of BatchNorm in eval mode."""
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 12))
    fixed = nn.Sequential(nn.Unflatten(1, (4, 3)), nn.BatchNorm1d(4), nn.Flatten(1))
    model = nn.Sequential(spectral, fixed, nn.Linear(12, 4)).double().eval()
    batch = torch.randn(B, 5).double(), torch.randint(4, (B,))
    ours, truth = RULES[rule]
    expected = plain.over_network(gradients(model, batch), truth)
    found, _ = aggregated(model, batch, ours("network"))
    assert_gradients(found, expected, 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_of_a_sum(rule: str) -> None:
    model, batch = larger("cnn")
    ours, truth = RULES[rule]
    expected = plain.over_network(gradients(model, batch, "sum"), truth)
    found, _ = aggregated(model, batch, ours("network"), "sum")
    assert_gradients(found, {n: x * B for n, x in expected.items()}, 1e-11)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_float32(name: str, rule: str) -> None:
    model, batch = larger(name, torch.float32)
    ours, truth = RULES[rule]
    found, _ = aggregated(model, batch, ours("network"))
    assert all(g.dtype == torch.float32 for g in found.values())
    assert_gradients(found, plain.over_network(gradients(model, batch), truth), 2e-5)


@pytest.mark.parametrize("per", PER)
def test_the_centre_is_carried_over(per: Any) -> None:
    rule = pc.CenteredClip(0.2, 2, per=per)
    expected: dict[str, Tensor] = {}
    for seed in range(3):
        model, batch = larger("cnn", seed=seed)
        rows = gradients(model, batch)
        joined = {
            n: torch.cat([expected.get(n, torch.zeros_like(g[0]))[None], g])
            for n, g in rows.items()
        }
        expected = PER[per](joined, lambda g: plain.centered_clip(g[1:], g[0], 0.2, 2))
        found, report = aggregated(model, batch, rule)
        assert_gradients(found, expected, 1e-11)
        assert_gradients(rule.centre.value, expected, 1e-11)
        assert (report.network is None) == (per == "parameter")
    assert found.keys() == rule.centre.value.keys()


def test_the_centre_does_not_share_memory_with_the_gradient() -> None:
    model, batch = larger("mlp")
    rule = pc.CenteredClip(0.2)
    aggregated(model, batch, rule)
    before = rule.centre.state_dict()
    for p in model.parameters():
        p.grad.zero_()
    assert all(torch.equal(v, before[n]) for n, v in rule.centre.value.items())


def test_the_centre_can_be_saved_and_reset() -> None:
    model, batch = larger("mlp")
    rule, other = pc.CenteredClip(0.2), pc.CenteredClip(0.2)
    assert rule == other
    aggregated(model, batch, rule)
    other.centre.load_state_dict(rule.centre.state_dict())
    a, b = (aggregated(model, batch, r)[0] for r in (rule, other))
    assert all(torch.equal(x, b[n]) for n, x in a.items())
    rule.centre.reset()
    fresh = aggregated(model, batch, pc.CenteredClip(0.2))[0]
    assert all(torch.equal(x, fresh[n]) for n, x in aggregated(model, batch, rule)[0].items())


def test_a_centre_of_something_else() -> None:
    rule = pc.CenteredClip(1.0)
    with pytest.raises(ValueError, match=r"rule\.centre\.state_dict\(\) gave.* for 'state', 'n'$"):
        rule.centre.load_state_dict({"state": {"0.weight": torch.ones(2)}, "n": 3})
    assert rule.centre.value == {}


def test_a_centre_of_another_model_is_refused() -> None:
    rule = pc.CenteredClip(0.2)
    aggregated(*larger("mlp"), rule)
    with pytest.raises(ValueError, match=r"a rule used with this model.*centre\.reset"):
        aggregated(*larger("cnn"), rule)


def test_a_result_that_is_not_finite_does_not_move_the_centre() -> None:
    model, (inputs, labels) = larger("mlp")
    rule = pc.CenteredClip(0.2)
    aggregated(model, (inputs, labels), rule)
    before = rule.centre.state_dict()
    inputs[0] = torch.nan
    found, _ = aggregated(model, (inputs, labels), rule)
    assert all(g.isnan().all() for g in found.values())
    assert all(torch.equal(v, before[n]) for n, v in rule.centre.value.items())


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("norm-clip", "auto-clip")])
def test_examples_that_are_not_finite_can_be_left_out(rule: str) -> None:
    model, (inputs, labels) = larger("cnn")
    ours, truth = RULES[rule]
    if rule in ("multi-krum", "bulyan"):  # ten examples are too few
        inputs, labels = torch.cat([inputs, inputs.flip(-1)]), torch.cat([labels, labels])
    inputs[1, 0, 0, 0] = torch.inf
    others = [b for b in range(len(inputs)) if b != 1]
    rows = gradients(model, (inputs[others], labels[others]))
    found, report = aggregated(model, (inputs, labels), ours("network"), nonfinite="drop")
    assert_gradients(found, plain.over_network(rows, truth), 1e-11)
    assert report.network.weights[1] == 0
    found, report = aggregated(model, (inputs, labels), ours("network"))
    assert all(g.isnan().all() for g in found.values())
    assert report.network.weights.isnan().all()


def test_clipping_counts_an_example_left_out_as_zero() -> None:
    model, (inputs, labels) = larger("cnn")
    inputs[1, 0, 0, 0] = torch.inf
    others = [b for b in range(B) if b != 1]
    rows = gradients(model, (inputs[others], labels[others]))
    expected = plain.over_network(rows, lambda g: plain.norm_clip(g, 0.4) * (B - 1) / B)
    found, _ = aggregated(model, (inputs, labels), pc.NormClip(0.4), nonfinite="drop")
    assert_gradients(found, expected, 1e-11)


def test_too_few_left_are_not_a_number() -> None:
    model, (inputs, labels) = larger("mlp")
    inputs[:3] = torch.nan
    for rule in (pc.Krum(4), pc.Bulyan(2)):
        found, _ = aggregated(model, (inputs, labels), rule, nonfinite="drop")
        assert all(g.isnan().all() for g in found.values())


def test_a_far_example_is_not_chosen() -> None:
    model, (inputs, labels) = larger("mlp", torch.float32)
    inputs[3] *= 1e9
    for rule in (pc.Krum(2, 3), pc.Bulyan(2)):
        _, report = aggregated(model, (inputs, labels), rule)
        assert 3 not in report.network.chosen


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5, 1e-6])
def test_float32_examples_that_nearly_agree(spread: float) -> None:
    """Their distances are differences of dot products that agree in most of their digits."""
    model, (inputs, labels) = larger("mlp", torch.float32)
    inputs = (inputs[:1] + spread * inputs).contiguous()
    labels = labels[:1].expand(B)
    rows = joined(gradients(model, (inputs, labels)))
    _, report = aggregated(model, (inputs, labels), pc.Krum(2, 4))
    scores = torch.tensor(plain.krum_scores(list(rows), 2))
    worst = scores[report.network.chosen].max()
    assert worst <= scores.sort().values[3] * 1.05
    found, _ = aggregated(model, (inputs, labels), pc.GeometricMedian())
    centre = plain.geometric_median(rows, 100, 1e-6, 1e-6)
    ours = torch.cat([g.flatten().double() for g in found.values()])
    assert (ours - centre).norm() <= 0.05 * (rows - centre).norm(
        dim=1
    ).mean() + 1e-6 * centre.norm()


def test_equal_examples() -> None:
    model, (inputs, labels) = larger("mlp", torch.float32)
    inputs, labels = inputs[2:3].repeat(B, 1), labels[2:3].repeat(B)
    expected = {n: g[0] for n, g in gradients(model, (inputs[:1], labels[:1])).items()}
    for rule in (pc.Krum(2, 3), pc.Bulyan(2), pc.GeometricMedian(), pc.GAF(0.5)):
        assert_gradients(aggregated(model, (inputs, labels), rule)[0], expected, 1e-5)


def test_reports() -> None:
    model, batch = larger("mlp")
    rows = joined(gradients(model, batch))
    names = [n for n, _ in model.named_parameters()]
    _, report = aggregated(model, batch, pc.Krum(2, 3))
    scores = torch.tensor(plain.krum_scores(list(rows), 2))
    assert report.batch_size == B
    assert report.network.chosen.tolist() == scores.argsort()[:3].tolist()
    assert report.network.weights.nonzero().flatten().tolist() == sorted(
        report.network.chosen.tolist()
    )
    assert all(report.by_parameter[n] is report.network for n in names)
    _, report = aggregated(model, batch, pc.NormClip(0.4))
    assert report.network.clipped == (rows.norm(dim=1) > 0.4).double().mean().item()
    _, report = aggregated(model, batch, pc.CenteredClip(0.3, 2))
    assert report.network.iterations == 2
    _, report = aggregated(model, batch, pc.GeometricMedian(7, tolerance=0))
    assert report.network.iterations == 7
    torch.testing.assert_close(report.network.weights.sum().item(), 1.0)
    _, report = aggregated(model, batch, pc.Krum(2, per="parameter"))
    assert report.network is None
    assert list(report.by_parameter) == names
    assert len({one.chosen.item() for one in report.by_parameter.values()}) > 1


def test_no_agreement_is_no_step() -> None:
    model, x = torch.nn.Linear(3, 1, bias=False), torch.eye(3)
    with pc.aggregate(model, pc.GAF(0.5)) as agg:
        model(x).mean().backward()
    assert model.weight.grad.tolist() == [[0, 0, 0]]
    assert agg.report.network.chosen.tolist() == []


def noisy(seed: int, per: Any = "network", reduction: Any = "mean") -> dict[str, Tensor]:
    model, batch = larger("mlp")
    generator = torch.Generator().manual_seed(seed)
    return aggregated(model, batch, pc.NormClip(0.4, 3.0, generator, per=per), reduction)[0]


@pytest.mark.parametrize("per", PER)
def test_noise(per: Any) -> None:
    model, batch = larger("mlp")
    clean, _ = aggregated(model, batch, pc.NormClip(0.4, per=per))
    parts = len(clean) if per == "parameter" else 1
    numbers = []
    for seed in range(20):
        found = noisy(seed, per)
        numbers += [(found[n] - x).flatten() for n, x in clean.items()]
    sample = torch.cat(numbers)
    expected = 3.0 * 0.4 * parts**0.5 / B
    assert abs(sample.std() / expected - 1) < 4 / (2 * len(sample)) ** 0.5
    assert abs(sample.mean() / expected) < 4 / len(sample) ** 0.5


def test_noise_comes_from_its_generator() -> None:
    state = torch.get_rng_state()
    first, again, other = noisy(1), noisy(1), noisy(2)
    assert all(torch.equal(x, again[n]) for n, x in first.items())
    assert not any(torch.equal(x, other[n]) for n, x in first.items())
    torch.set_rng_state(state)
    total = noisy(1, reduction="sum")
    clean, clean_total = (
        aggregated(*larger("mlp"), pc.NormClip(0.4), r)[0] for r in ("mean", "sum")
    )
    for n, x in first.items():
        torch.testing.assert_close((x - clean[n]) * B, total[n] - clean_total[n])


def test_noise_is_added_to_parameters_that_took_no_part() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)})
    for noise, has in ((0.0, False), (1.0, True)):
        model.zero_grad()
        with pc.aggregate(model, pc.NormClip(1.0, noise)):
            model["a"](torch.ones(4, 3)).square().sum().backward()
        assert (model["b"].weight.grad is not None) == has


def test_the_centre_moves_parameters_that_took_no_part() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(3, 2)})
    rule = pc.CenteredClip(0.5)
    for used, names in (("a", {"a.weight", "a.bias"}), ("b", set(dict(model.named_parameters())))):
        model.zero_grad()
        with pc.aggregate(model, rule):
            model[used](torch.ones(4, 3)).square().sum(1).mean().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names


test_values = raising(
    ValueError,
    {
        "krum-f": (lambda: pc.Krum(-1), "f to be at least 0, got -1"),
        "krum-m": (lambda: pc.Krum(1, 0), "m to be at least 1, got 0"),
        "per": (
            lambda: pc.Krum(1, per="layer"),
            "per to be 'network' or 'parameter', or .*'layer'",
        ),
        "bulyan": (lambda: pc.Bulyan(-1), "f to be at least 0"),
        "iterations": (lambda: pc.GeometricMedian(0), "iterations to be at least 1"),
        "nu": (lambda: pc.GeometricMedian(nu=0), "nu to be positive, got 0"),
        "tolerance": (lambda: pc.GeometricMedian(tolerance=-1), "tolerance to be zero or more"),
        "radius": (lambda: pc.CenteredClip(0.0), "radius to be positive, got 0.0"),
        "max_norm": (lambda: pc.NormClip(-1.0), "max_norm to be positive"),
        "noise": (lambda: pc.NormClip(1.0, -1.0), "noise_multiplier to be zero or more"),
        "gaf": (lambda: pc.GAF(2.5), "threshold from 0 to 2, got 2.5"),
    },
)
test_types = raising(
    TypeError,
    {
        "krum": (lambda: pc.Krum(1.5), "f to be an integer, got 1.5"),
        "radius": (lambda: pc.CenteredClip("1"), "radius to be a number"),
        "generator": (
            lambda: pc.NormClip(1.0, 1.0, 3),
            "expected a torch.Generator or .*, got int",
        ),
    },
)
