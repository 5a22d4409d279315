"""A replay is what a block is, bit for bit, whatever the model, the statistics and the rule."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import MODELS, classification, make
from support.replayed import assert_same, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoherence as pc
from pycoherence.replay import known

EVERY = (pc.SqNorms(), pc.Moments(), pc.SignSum(), pc.Gram(), pc.Dots("mean"))
RULES: dict[str, Callable[[], Any]] = {
    "winsorized": lambda: pc.Winsorized(1),
    "median": pc.Median,
    "sign-agreement": lambda: pc.SignAgreement(0.5),
    "krum": lambda: pc.Krum(1),
    "geometric-median": pc.GeometricMedian,
    "centered-clip": lambda: pc.CenteredClip(0.5, iterations=2),
    "norm-clip": lambda: pc.NormClip(0.3),
    "norm-clip-with-noise": lambda: pc.NormClip(0.3, noise_multiplier=0.5),
    "norm-clip-each": lambda: pc.NormClip(0.3, per="parameter"),
    "gaf": lambda: pc.GAF(1.0),
    "bulyan": lambda: pc.Bulyan(1),
    "monna": lambda: pc.MoNNA(3, 1),
    "auto-clip-with-noise": lambda: pc.AutoClip(
        {"a": 0.2, "b": 0.3}, 0.5, per={"a": ["0.*"], "b": ["*"]}, expected_batch_size=9
    ),
    "nnm-krum": lambda: pc.NNM(1, pc.Krum(1)),
    "bucketing-trimmed-mean": lambda: pc.Bucketing(2, pc.TrimmedMean(1)),
    "arc-centered-clip": lambda: pc.ARC(1, pc.CenteredClip(0.5)),
}


def mlp() -> Any:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 4))


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(4, (n,))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sum_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class Tied(nn.Module):
    """An embedding that is its own head, before and after an LSTM and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.lstm(self.attention(self.embedding(ids)))[0]
        return F.linear(hidden[:, -1], self.embedding.weight)


class Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.b = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.a, x, use_reentrant=False))


def running() -> Any:
    """Running statistics, which each step writes."""
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), norm, nn.Flatten(), nn.Linear(6, 4))


def parametrized() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 4))


def under_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch[0])
    return F.cross_entropy(out.float(), batch[1])


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(9, (5, 4)), torch.randint(9, (5,))


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "mlp": (mlp, batch, mean_loss),
    "tied": (Tied, tokens, mean_loss),
    "checkpointed": (Checkpointed, batch, mean_loss),
    "running-statistics": (running, batch, mean_loss),
    "parametrized": (parametrized, batch, mean_loss),
    "autocast": (mlp, batch, under_autocast),
    "float64": (lambda: mlp().double(), lambda: (batch()[0].double(), batch()[1]), mean_loss),
    "frozen": (lambda: _frozen(mlp()), batch, mean_loss),
    "one-example": (mlp, lambda: batch(1), mean_loss),
}


def _frozen(model: Any) -> Any:
    model[0].weight.requires_grad_(False)
    return model


def twins(build: Callable[[], Any]) -> Any:
    model = build()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_is_what_a_block_is(kind: str) -> None:
    build, inputs, loss_fn = KINDS[kind]
    model, twin = twins(build)
    step = pc.compile(model, loss_fn, *EVERY)
    for _ in range(3):  # gradients are set first, and then added
        assert_same(step, model, twin, loss_fn, inputs(), *EVERY)
    assert step.traces == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name: str) -> None:
    model, (inputs, labels) = make(name)
    twin, loss_fn = copy.deepcopy(model), classification("sum")
    options: dict[str, Any] = {"loss_reduction": "sum"}
    step = pc.compile(model, loss_fn, pc.SqNorms(), **options)
    for _ in range(3):
        order = torch.randperm(len(labels))
        given = inputs[order], labels[order]
        assert_same(step, model, twin, loss_fn, given, pc.SqNorms(), **options)
    assert step.traces == 1


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    model, twin = twins(mlp)
    statistics = pc.SqNorms(), pc.Gram()  # which rules by dot products reuse
    step = pc.compile(model, mean_loss, *statistics, rule=RULES[name]())
    rule = RULES[name]()  # with a state of its own
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()
        assert_same(step, model, twin, mean_loss, batch(), *statistics, rule=rule)
    assert step.traces == (2 if "centered-clip" in name else 1)  # which begins without a centre


@pytest.mark.parametrize("name", ["winsorized", "krum", "bucketing-trimmed-mean"])
def test_examples_that_are_not_finite_are_dropped(name: str) -> None:
    model, twin = twins(mlp)
    rule, options = RULES[name](), {"nonfinite": "drop"}
    step = pc.compile(model, mean_loss, rule=rule, nonfinite="drop")
    for bad in (0.0, torch.nan, torch.inf):
        x, y = batch(9)
        x[2, 3] = bad
        model.zero_grad()
        twin.zero_grad()
        assert_same(step, model, twin, mean_loss, (x, y), rule=rule, **options)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert step.traces == 1


@pytest.mark.parametrize("close", [False, True])
def test_krum_of_close_examples_is_exact(close: bool) -> None:
    """A block takes products in float64 only if examples are close, which is told by numbers."""
    model, twin = twins(lambda: nn.Linear(6, 4))
    step = pc.compile(model, mean_loss, rule=pc.Krum(1))
    for nearness in (1.0, 1e-6) if close else (1e-6, 1.0):
        x, y = batch()
        given = x[:1] + nearness * x, y[:1].expand(7).clone()
        assert_same(step, model, twin, mean_loss, given, rule=pc.Krum(1))
    assert step.traces == 1


def test_a_rule_of_the_record() -> None:
    def weigh(record: pc.Record) -> Tensor:
        return 1 / (1 + record.sq_norms)

    model, twin = twins(mlp)
    step = pc.compile(model, mean_loss, pc.SqNorms(), rule=pc.Reweight(weigh))
    for _ in range(3):
        rule = pc.Reweight(weigh)
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms(), rule=rule)


@pytest.mark.parametrize("rule", [None, pc.Median(), pc.NormClip(0.2)], ids=str)
def test_sums_groups_and_scales(rule: Any) -> None:
    options: dict[str, Any] = {"loss_reduction": "sum", "group_size": 2}
    model, twin = twins(mlp)
    scaled = lambda model, batch: 8 * sum_loss(model, batch)  # noqa: E731
    step = pc.compile(model, sum_loss, pc.SqNorms(), rule=rule, loss_scale=8, **options)
    for _ in range(3):
        given = batch(6)
        state = torch.get_rng_state()
        record = step(given)
        torch.set_rng_state(state)
        block: Any = pc.collect(twin, pc.SqNorms(), loss_scale=8, **options)
        if rule is not None:
            block = pc.aggregate(twin, rule, pc.SqNorms(), loss_scale=8, **options)
        with block as entered:
            scaled(twin, given).backward()
        if rule is not None:
            record, entered = record.record, entered.record
        assert same(record.sq_norms, entered.sq_norms)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert same(p.grad, q.grad)
    assert step.traces == 1


def test_a_scaler_may_change_its_scale() -> None:
    model: Any = nn.Linear(6, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes it
    step = pc.compile(model, mean_loss, pc.SqNorms(), loss_scale=scaler)
    given = batch()
    first, plain = step(given), model.weight.grad.clone()
    scaler.update(new_scale=16.0)
    model.zero_grad()
    second = step(given)
    torch.testing.assert_close(second.sq_norms, first.sq_norms)
    torch.testing.assert_close(model.weight.grad, 4 * plain)
    torch.testing.assert_close(second.loss, first.loss)
    assert step.traces == 1


def test_hooks_of_parameters_run() -> None:
    model, twin = twins(lambda: nn.Linear(6, 4))
    seen: list[str] = []
    for each in (model, twin):
        each.weight.register_hook(lambda g: 2 * g)
        each.bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for n in range(1, 4):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
        assert len(seen) == 2 * n  # once for each step of each, and not for checks


def test_a_batch_may_be_nested_and_hold_numbers() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return batch["weight"] * mean_loss(model, batch["data"])

    model, twin = twins(lambda: nn.Linear(6, 4))
    step = pc.compile(model, loss_fn, pc.SqNorms())
    for weight in (1.0, 1.0, 2.0):
        given = {"data": list(batch()), "weight": weight, "name": "x"}
        assert_same(step, model, twin, loss_fn, given, pc.SqNorms())
    assert step.traces == 2


def test_what_is_not_finite_shows_as_in_a_block() -> None:
    model, twin = twins(lambda: nn.Linear(6, 4))
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for bad in (0.0, torch.nan, torch.inf):
        x, y = batch()
        x[2, 3] = bad
        given = x, y
        state = torch.get_rng_state()
        record = step(given)
        torch.set_rng_state(state)
        with pc.collect(twin, pc.SqNorms()) as expected:
            mean_loss(twin, given).backward()
        assert same(record.sq_norms, expected.sq_norms)
        assert same(model.weight.grad, twin.weight.grad)
        model.zero_grad()
        twin.zero_grad()


def test_results_do_not_change_later() -> None:
    """Neither a record nor a gradient shares memory with what comes after it."""
    model: Any = nn.Linear(6, 4, bias=False)
    step = pc.compile(model, mean_loss, pc.Moments())
    record = step(batch())
    moment = record.by_parameter["weight"].first_moment
    gradient = model.weight.grad
    before = gradient.clone()
    step(batch())
    assert same(record.by_parameter["weight"].first_moment, moment)
    assert model.weight.grad is gradient  # added in place
    assert not same(gradient, before)


def test_nothing_holds_the_batch_or_is_left_on_the_model() -> None:
    model = mlp()
    step = pc.compile(model, mean_loss, pc.SqNorms())
    x, y = batch()
    alive = weakref.ref(x)
    names = set(vars(model[0]))
    record = step((x, y))
    del x, y
    gc.collect()
    assert alive() is None
    assert set(vars(model[0])) == names
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert record.sq_norms.shape == (7,)


def test_blocks_are_as_they_were() -> None:
    """A trace leaves no tensors without numbers in caches."""
    gc.collect()
    others = {id(x) for x in gc.get_objects() if type(x) is known.FakeTensor}  # of tests before
    model, twin = twins(Tied)
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for _ in range(2):
        given = tokens()
        model.zero_grad()
        twin.zero_grad()
        assert_same(step, model, twin, mean_loss, given, pc.SqNorms())
        with pc.collect(model, pc.SqNorms()) as record:
            mean_loss(model, given).backward()
        assert type(record.sq_norms) is Tensor
    alive = [x for x in gc.get_objects() if type(x) is known.FakeTensor]
    assert {id(x) for x in alive} <= others


def test_the_record_of_a_block_says_who_has_the_loss() -> None:
    model: Any = nn.Linear(6, 4)
    with pc.collect(model, pc.SqNorms()) as record:
        mean_loss(model, batch()).backward()
    with pytest.raises(AttributeError, match=r"pc\.compile"):
        record.loss  # noqa: B018


def test_a_check_may_be_made_again() -> None:
    model, twin = twins(running)
    step = pc.compile(model, mean_loss, pc.SqNorms(), check=2)
    for _ in range(5):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    assert step.traces == 1


def test_without_a_check() -> None:
    model, twin = twins(mlp)
    step = pc.compile(model, mean_loss, pc.SqNorms(), check=False)
    for _ in range(3):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
