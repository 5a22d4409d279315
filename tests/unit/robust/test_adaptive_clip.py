"""The threshold that adapts, against the paper's steps on norms taken one at a time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracle import joined
from support.raising import raising
from support.ranks import needs_gloo, run_ranks
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy

import pycoherence as pc
from pycoherence.robust import Rule

START, Q, RATE = 0.3, 0.7, 0.5


def moved(c: float, norms: Tensor, n: float | None = None, noise: float = 0.0) -> float:
    """The threshold after a step, as the paper has it."""
    size = len(norms)
    bits = sum(float(norm <= c) - 0.5 for norm in norms)
    share = 0.5 + (bits + noise) / (size if n is None else n)
    return c * math.exp(-RATE * (share - Q))


def rule_of(**options: Any) -> pc.AdaptiveClip:
    return pc.AdaptiveClip(START, quantile=Q, learning_rate=RATE, **options)


def test_steps_of_the_paper() -> None:
    rule, c = rule_of(), START
    for seed in range(4):
        model, batch = larger("cnn", seed=seed)
        rows = gradients(model, batch)
        expected, _ = aggregated(model, batch, pc.NormClip(c))
        found, report = aggregated(model, batch, rule)
        assert_gradients(found, expected, 1e-11)
        norms = joined(rows).norm(dim=1)
        assert report.network.clipped == (norms > c).double().mean().item()
        c = moved(c, norms)
        assert rule.threshold.state_dict() == {"network": pytest.approx(c)}


def test_it_finds_the_quantile() -> None:
    model, batch = larger("mlp")
    norms = joined(gradients(model, batch)).norm(dim=1)
    median = norms.median().item()
    for start in (median / 4, median * 4):
        rule = pc.AdaptiveClip(start, learning_rate=0.1)
        for _ in range(50):
            aggregated(model, batch, rule)
        assert abs(rule.threshold.value["network"] / median - 1) < 0.1


def test_groups_and_parameters_have_thresholds_of_their_own() -> None:
    model, batch = larger("mlp")
    rows = gradients(model, batch)
    rule = rule_of(per="parameter")
    aggregated(model, batch, rule)
    expected = {n: moved(START, g.flatten(1).norm(dim=1)) for n, g in rows.items()}
    assert rule.threshold.state_dict() == {n: pytest.approx(c) for n, c in expected.items()}
    per: Any = {"first": ["0.*"], "rest": ["*"]}
    limits = {"first": 0.1, "rest": 0.3}
    grouped = pc.AdaptiveClip(limits, per=per, quantile=Q, learning_rate=RATE)
    for _ in range(2):
        aggregated(model, batch, grouped)
    for group, start in limits.items():
        mine = {n: g for n, g in rows.items() if n.startswith("0.") == (group == "first")}
        norms = joined(mine).norm(dim=1)
        c = moved(moved(start, norms), norms)
        assert grouped.threshold.state_dict()[group] == pytest.approx(c)


def test_one_step_of_several_batches_moves_it_once() -> None:
    model, (inputs, labels) = larger("cnn")
    norms = joined(gradients(model, (inputs, labels))).norm(dim=1)
    whole = rule_of(expected_batch_size=20)
    expected, _ = aggregated(model, (inputs, labels), whole)
    rule = rule_of(expected_batch_size=20)
    model.zero_grad()
    parts = (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, B))
    for i, part in enumerate(parts):
        assert rule.threshold.state_dict() == {}
        with pc.aggregate(model, rule, last=i == len(parts) - 1):
            cross_entropy(model(inputs[part]), labels[part]).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert_gradients(found, expected, 1e-11)
    assert rule.threshold.state_dict() == {"network": pytest.approx(moved(START, norms, 20))}


def same(value: float) -> Callable[..., Tensor]:
    return lambda shape, dtype, device: torch.full(shape, value, dtype=dtype, device=device)


@pytest.mark.parametrize("per", ["network", "parameter"])
def test_noise_is_shared_out_between_gradients_and_counts(per: Any) -> None:
    model, batch = larger("mlp")
    rows = gradients(model, batch)
    options: Any = {"per": per, "expected_batch_size": 20, "count_noise": 4.0}
    clean, _ = aggregated(model, batch, rule_of(**{**options, "count_noise": 0.0}))
    rule = pc.AdaptiveClip(START, 1.5, same(1.0), quantile=Q, learning_rate=RATE, **options)
    found, _ = aggregated(model, batch, rule)
    groups = len(rows) if per == "parameter" else 1
    sigma = (1.5**-2 - groups * 8.0**-2) ** -0.5
    noise = sigma * START * groups**0.5 / 20
    assert_gradients(found, {n: x + noise for n, x in clean.items()}, 1e-11)
    norms = joined(rows).norm(dim=1)
    if per == "network":
        c = moved(START, norms, 20, 4.0)
        assert rule.threshold.state_dict() == {"network": pytest.approx(c)}


def test_the_noise_of_counts_is_a_twentieth_of_a_batch() -> None:
    assert pc.AdaptiveClip(1.0, 1.0, expected_batch_size=60).count_noise == 3.0
    assert pc.AdaptiveClip(1.0, expected_batch_size=60).count_noise == 0.0


def test_an_empty_step_moves_it_by_noise_alone() -> None:
    model = nn.Linear(3, 2)
    rule, noisy = pc.AdaptiveClip(1.0), pc.AdaptiveClip(1.0, 1.0, same(1.0), expected_batch_size=40)
    for each in (rule, noisy):
        with pc.aggregate(model, each, loss_reduction="sum"):
            model(torch.ones(0, 3)).sum().backward()
    assert rule.threshold.state_dict() == {}
    c = math.exp(-0.2 * (0.5 + 2.0 / 40 - 0.5))
    assert noisy.threshold.state_dict() == {"network": pytest.approx(c)}


def test_a_group_without_a_part_is_inside() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    rule = pc.AdaptiveClip(1e-9, per={"a": ["a.*"], "b": ["b.*"]}, learning_rate=1.0)
    with pc.aggregate(model, rule):
        model["a"](torch.ones(4, 3)).square().sum(1).mean().backward()
    state = rule.threshold.state_dict()
    assert state == {
        "a": pytest.approx(1e-9 * math.exp(0.5)),
        "b": pytest.approx(1e-9 * math.exp(-0.5)),
    }


def test_it_can_be_saved_and_reset() -> None:
    model, batch = larger("mlp")
    rule, other = rule_of(), rule_of()
    for _ in range(3):
        aggregated(model, batch, rule)
    other.threshold.load_state_dict(rule.threshold.state_dict())
    a, b = (aggregated(model, batch, each)[0] for each in (rule, other))
    assert all(torch.equal(x, b[n]) for n, x in a.items())
    rule.threshold.reset()
    assert rule.threshold.state_dict() == {}
    with pytest.raises(ValueError, match=r"rule\.threshold\.state_dict\(\) gave.*for 'network'"):
        rule.threshold.load_state_dict({"network": -1.0})
    other.threshold.load_state_dict({"head": 1.0})
    with pytest.raises(ValueError, match=r"one for head.*rule\.threshold\.reset\(\)"):
        pc.aggregate(model, other).__enter__()


RULES: list[Callable[[], Rule]] = [
    lambda: rule_of(),
    lambda: pc.CenteredClip(0.1),
    lambda: pc.ARC(1, rule_of()),
    lambda: pc.NNM(1, pc.CenteredClip(0.1)),
]


@pytest.mark.parametrize("make", RULES)
def test_a_rule_goes_on_from_its_state(make: Callable[[], Rule]) -> None:
    model, batch = larger("mlp")
    rule, other, new = make(), make(), make()
    for _ in range(3):
        aggregated(model, batch, rule)
    other.load_state_dict(rule.state_dict())
    found = [aggregated(model, batch, each)[0] for each in (rule, other, new)]
    assert all(torch.equal(x, found[1][n]) for n, x in found[0].items())
    assert not all(torch.equal(x, found[2][n]) for n, x in found[0].items())
    with pytest.raises(ValueError, match=r"with (centre|threshold), got one with nothing; give"):
        rule.load_state_dict({})


@pytest.mark.parametrize("rule", [pc.NormClip(1.0), pc.Median(), pc.NNM(1, pc.Median())])
def test_most_rules_have_no_state(rule: Rule) -> None:
    assert rule.state_dict() == {}
    rule.load_state_dict({})
    with pytest.raises(ValueError, match="with nothing, got one with centre; give"):
        rule.load_state_dict({"centre": {}})


def check_ranks(rank: int) -> None:
    net = nn.Linear(200, 50, bias=False).double()
    dist.broadcast(net.weight.data, 0)
    torch.manual_seed(rank)
    x = torch.randn(3 + rank, 200, dtype=torch.float64)
    rule = pc.AdaptiveClip(1.0, 1.0, expected_batch_size=40)
    with pc.aggregate(net, rule, group=dist.group.WORLD):
        net(x).sum(1).mean().backward()
    found = rule.threshold.value["network"].clone()
    dist.broadcast(found, 0)
    assert found == rule.threshold.value["network"] != 1.0


@needs_gloo
def test_ranks_have_one_threshold() -> None:
    run_ranks(2, check_ranks)


test_values = raising(
    ValueError,
    {
        "quantile": (lambda: rule_of_quantile(1.5), "quantile from 0 to 1, got 1.5"),
        "rate": (lambda: pc.AdaptiveClip(1.0, learning_rate=0), "learning_rate to be positive"),
        "expected": (lambda: pc.AdaptiveClip(1.0, 1.0), "expected_batch_size with noise"),
        "small": (
            lambda: pc.AdaptiveClip(1.0, 3.0, expected_batch_size=20),
            "count_noise above 1.5, so that noise_multiplier=3.0 covers .*, got 1.0",
        ),
        "gamma": (lambda: pc.AutoClip(gamma=0), "gamma to be positive"),
    },
)


def rule_of_quantile(q: float) -> pc.AdaptiveClip:
    return pc.AdaptiveClip(1.0, quantile=q)


def test_groups_need_more_noise_on_counts() -> None:
    model, _ = larger("mlp")
    rule = pc.AdaptiveClip(1.0, 1.0, expected_batch_size=12, per="parameter")
    with pytest.raises(ValueError, match=r"thresholds of \d groups too, got 0\.6"):
        pc.aggregate(model, rule).__enter__()
