"""Clipping for privacy: what the sum is divided by, when noise comes, groups, and its sources."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support import plain_rules as plain
from support.oracle import joined
from support.raising import raising
from support.ranks import needs_gloo, run_ranks
from support.steps import B, aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import pycoherence as pc

C, SIGMA = 0.4, 3.0
PARTS = (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, B))  # a single one and an empty one too


def clipped_sum(rows: dict[str, Tensor], limit: float = C) -> dict[str, Tensor]:
    n = len(joined(rows))
    return plain.over_network(rows, lambda g: plain.norm_clip(g, limit) * n)


def of(seed: int = 0, **options: Any) -> pc.NormClip:
    return pc.NormClip(C, SIGMA, torch.Generator().manual_seed(seed), **options)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def std_is(sample: Tensor, expected: float) -> None:
    n = sample.numel()
    assert abs(sample.std().item() / expected - 1) < 5 / (2 * n) ** 0.5
    assert abs(sample.mean().item() / expected) < 5 / n**0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_divisor_is_what_was_expected(reduction: Any) -> None:
    model, batch = larger("cnn")
    truth = clipped_sum(gradients(model, batch, reduction))
    rule = pc.NormClip(C, expected_batch_size=20)
    found, report = aggregated(model, batch, rule, reduction)
    divisor = 20 if reduction == "mean" else 1
    assert_gradients(found, {n: x / divisor for n, x in truth.items()}, 1e-11)
    weights = report.network.weights @ joined(gradients(model, batch, reduction)).double()
    torch.testing.assert_close(weights * 20, torch.cat([x.flatten() for x in truth.values()]))


@pytest.mark.parametrize("scale", [1.0, 1 / 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_a_step_add_up_to_one(reduction: Any, scale: float) -> None:
    """With noise once, that of the whole step, whatever the sizes of its batches."""
    model, (inputs, labels) = larger("cnn")
    expected, _ = aggregated(model, (inputs, labels), of(expected_batch_size=7), reduction)
    model.zero_grad()
    rule = of(expected_batch_size=7)
    for i, part in enumerate(PARTS):
        options: Any = {"loss_reduction": reduction, "loss_scale": scale}
        with pc.aggregate(model, rule, **options, last=i == len(PARTS) - 1):
            loss = cross_entropy(model(inputs[part]), labels[part], reduction=reduction)
            (loss * scale).backward()
    assert_gradients(grads(model), {n: x * scale for n, x in expected.items()}, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scaler", [False, True])
def test_what_a_loss_is_divided_by_is_left_out_of_the_gradient(
    reduction: Any, scaler: bool
) -> None:
    """The sum over a step is divided by the number that was expected, and by nothing else."""
    model, (inputs, labels) = larger("cnn")
    expected, _ = aggregated(model, (inputs, labels), of(expected_batch_size=7), reduction)
    model.zero_grad()
    rule, kept = of(expected_batch_size=7), 8.0 if scaler else 1.0
    scale: Any = torch.amp.GradScaler("cpu", init_scale=8.0) if scaler else 1
    for i, part in enumerate(PARTS):
        options: Any = {"loss_reduction": reduction, "loss_scale": kept / 4, "grad_scale": scale}
        with pc.aggregate(model, rule, **options, last=i == len(PARTS) - 1):
            loss = cross_entropy(model(inputs[part]), labels[part], reduction=reduction)
            (loss * kept / 4).backward()
    assert_gradients(grads(model), {n: x * kept for n, x in expected.items()}, 1e-11)


def test_other_rules_keep_the_scale_of_the_loss() -> None:
    model, (inputs, labels) = larger("mlp")
    expected, _ = aggregated(model, (inputs, labels), pc.NormClip(C))
    model.zero_grad()
    with pc.aggregate(model, pc.NormClip(C), loss_scale=1 / 4, grad_scale=1.0):
        (cross_entropy(model(inputs), labels) / 4).backward()
    assert_gradients(grads(model), {n: x / 4 for n, x in expected.items()}, 1e-11)


@pytest.mark.parametrize(("scale", "kind"), [("2", TypeError), (0, ValueError), (abs, TypeError)])
def test_gradients_are_multiplied_by_numbers(scale: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="expected grad_scale to be a positive number or"):
        pc.aggregate(wide(), pc.NormClip(C), grad_scale=scale)


def wide() -> nn.Module:
    return nn.Linear(100, 50, bias=False).double()


def test_the_noise_of_a_step_is_that_of_one_batch() -> None:
    """2.0 and not 3.85, which it is when each of four micro-batches adds some."""
    model, x = wide(), torch.zeros(3, 100).double()
    rule = pc.NormClip(1.0, 2.0)
    for last in (False, False, False, True):
        with pc.aggregate(model, rule, loss_reduction="sum", last=last):
            model(x).sum().backward()
    std_is(model.weight.grad, 2.0)


@pytest.mark.parametrize("sizes", [(1, 8), (8, 1), (8, 1, 0), (0, 4, 1, 8)])
def test_the_noise_of_a_step_hides_an_example_of_its_smallest_batch(sizes: Any) -> None:
    """An example of a batch of one moves the sum of means by the limit, others by less."""
    model, x, rule = wide(), torch.zeros(8, 100).double(), pc.NormClip(1.0, 2.0)
    for scale in (4.0, 0.5):  # the second step begins anew
        model.zero_grad()
        for i, n in enumerate(sizes):
            with pc.aggregate(model, rule, loss_scale=scale, last=i == len(sizes) - 1):
                (model(x[:n]).sum() * scale / max(n, 1)).backward()
        std_is(model.weight.grad, 2.0 * scale / min(n for n in sizes if n))
    model.zero_grad()
    with pc.aggregate(model, rule):
        model(x).sum(1).mean().backward()
    std_is(model.weight.grad, 2.0 / 8)


def test_the_noise_of_a_step_has_the_largest_scale_of_its_losses() -> None:
    model, x, rule = wide(), torch.zeros(3, 100).double(), pc.NormClip(1.0, 2.0)
    for last, scale in ((False, 1 / 5), (False, 1 / 2), (True, 1 / 40)):
        options: Any = {"loss_reduction": "sum", "loss_scale": scale}
        with pc.aggregate(model, rule, **options, last=last):
            (model(x).sum() * scale).backward()
    std_is(model.weight.grad, 2.0 / 2)


def test_an_empty_batch_has_the_noise_of_a_sum() -> None:
    model, x = wide(), torch.zeros(0, 100).double()
    for expected, reduction, std in ((None, "sum", 2.0), (8, "sum", 2.0), (8, "mean", 0.25)):
        model.zero_grad()
        rule: Any = pc.NormClip(1.0, 2.0, expected_batch_size=expected)
        with pc.aggregate(model, rule, loss_reduction=reduction):
            loss = model(x).mean() if reduction == "mean" else model(x).sum()
            loss.backward()
        std_is(model.weight.grad, std)


def test_a_step_that_missed_its_noise_is_noticed() -> None:
    model, batch = larger("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = of()
    for last in (False, True, False):
        with pc.aggregate(model, rule, last=last):
            cross_entropy(model(batch[0]), batch[1]).backward()
        if last:
            optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"noise of that step was never added.*last=True"):
        pc.aggregate(model, rule).__enter__()
    with pc.aggregate(model, rule):  # said once
        cross_entropy(model(batch[0]), batch[1]).backward()


def test_rules_can_be_copied_within_a_step() -> None:
    model, batch = larger("mlp")
    rule = pc.NormClip(C, SIGMA)
    with pc.aggregate(model, rule, last=False):
        cross_entropy(model(batch[0]), batch[1]).backward()
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule


def test_a_step_without_noise_may_end_as_it_likes() -> None:
    model, batch = larger("mlp")
    rule = pc.NormClip(C)
    for _ in range(2):
        with pc.aggregate(model, rule, last=False):
            cross_entropy(model(batch[0]), batch[1]).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_groups_are_clipped_each_alone() -> None:
    model, batch = larger("mlp")
    rows = gradients(model, batch)
    per: Any = {"first": ["0.*"], "biases": ["*bias"], "rest": ["*"]}
    limits = {"first": 0.1, "biases": 0.02, "rest": 0.3}
    member = {
        n: "first" if n.startswith("0.") else "biases" if n.endswith("bias") else "rest"
        for n in rows
    }
    assert set(member.values()) == set(limits)
    expected: dict[str, Tensor] = {}
    for group, limit in limits.items():
        mine = {n: g for n, g in rows.items() if member[n] == group}
        expected |= plain.over_network(mine, lambda g, c=limit: plain.norm_clip(g, c))
    found, report = aggregated(model, batch, pc.NormClip(limits, per=per))
    assert_gradients(found, {n: expected[n] for n in found}, 1e-11)
    assert report.network is None
    for n, decision in report.by_parameter.items():
        group = joined({m: g for m, g in rows.items() if member[m] == member[n]})
        beyond = (group.norm(dim=1) > limits[member[n]]).double().mean().item()
        assert decision.clipped == beyond


def test_one_limit_for_all_groups_and_one_for_each_parameter() -> None:
    model, batch = larger("mlp")
    rows = gradients(model, batch)
    names = list(rows)
    per: Any = {n: [n] for n in names}
    expected = plain.by_parameter(rows, lambda g: plain.norm_clip(g, C))
    assert_gradients(aggregated(model, batch, pc.NormClip(C, per=per))[0], expected, 1e-11)
    limits = {n: 0.05 * (i + 1) for i, n in enumerate(names)}
    expected = {
        n: plain.norm_clip(g.flatten(1), limits[n]).view(g.shape[1:]) for n, g in rows.items()
    }
    found, _ = aggregated(model, batch, pc.NormClip(limits, per="parameter"))
    assert_gradients(found, expected, 1e-11)


def test_groups_of_other_rules() -> None:
    model, batch = larger("mlp")
    rows = gradients(model, batch)
    per: Any = {"first": ["0.*"], "rest": ["*"]}
    parts = ({n: g for n, g in rows.items() if n.startswith("0.") == first} for first in (1, 0))
    expected: dict[str, Tensor] = {}
    for part in parts:
        expected |= plain.over_network(part, lambda g: plain.krum(g, 2))
    found, _ = aggregated(model, batch, pc.Krum(2, per=per))
    assert_gradients(found, {n: expected[n] for n in found}, 1e-11)


def test_noise_covers_what_an_example_may_move_all_groups_by() -> None:
    model = nn.Sequential(wide(), nn.Linear(50, 40).double())
    x = torch.zeros(2, 100).double()
    per: Any = {"a": ["0.*"], "b": ["*"]}
    with pc.aggregate(model, pc.NormClip({"a": 3.0, "b": 4.0}, 2.0, per=per)):
        (model(x).sum(1) * 0).mean().backward()
    std_is(torch.cat([p.grad.flatten() for p in model.parameters()]), 2.0 * 5.0 / 2)


def test_a_parameter_in_no_group_and_a_pattern_of_none() -> None:
    model, _ = larger("mlp")
    one: Any = {"a": ["0.*"]}
    with pytest.raises(ValueError, match=r"none for '2\.weight'.*add a last group \['\*'\]"):
        pc.aggregate(model, pc.NormClip(C, per=one)).__enter__()
    more: Any = {"a": ["1.wieght"], "b": ["*"]}
    with pytest.raises(ValueError, match=r"got '1\.wieght'; the parameters are 0\.weight"):
        pc.aggregate(model, pc.Krum(2, per=more)).__enter__()
    with pytest.raises(ValueError, match=r"max_norm for the groups 0\.weight.*got it for a"):
        pc.aggregate(model, pc.NormClip({"a": 1.0}, per="parameter")).__enter__()


def test_secure_numbers_are_standard_normal() -> None:
    numbers = pc.secure_normal((301, 101), torch.float64)
    std_is(numbers, 1.0)
    tail = (numbers.abs() > 1.959964).double().mean().item()
    assert abs(tail - 0.05) < 5 * (0.05 * 0.95 / numbers.numel()) ** 0.5
    assert not torch.equal(numbers, pc.secure_normal((301, 101), torch.float64))
    assert pc.secure_normal((), torch.float16).dtype == torch.float16
    assert pc.secure_normal((3, 0)).shape == (3, 0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    pc.secure_normal((5,))
    assert torch.equal(state, torch.get_rng_state())


def test_numbers_of_the_user_s() -> None:
    model, batch = larger("mlp")
    asked: list[Any] = []

    def ones(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        asked.append((shape, dtype, device.type))
        return torch.ones(shape, dtype=dtype, device=device)

    clean, _ = aggregated(model, batch, pc.NormClip(C))
    found, _ = aggregated(model, batch, pc.NormClip(C, SIGMA, ones))
    assert_gradients(found, {n: x + C * SIGMA / B for n, x in clean.items()}, 1e-11)
    assert asked == [(tuple(x.shape), x.dtype, "cpu") for x in clean.values()]
    std_is(
        torch.cat(
            [
                (
                    aggregated(model, batch, pc.NormClip(C, SIGMA, pc.secure_normal))[0][n] - x
                ).flatten()
                for n, x in clean.items()
            ]
        ),
        C * SIGMA / B,
    )
    with pytest.raises(ValueError, match=r"numbers in torch\.float64.*got \(2,\)"):
        aggregated(model, batch, pc.NormClip(C, SIGMA, lambda *_: torch.ones(2)))


def check_accumulated_noise(rank: int) -> None:
    """Under DistributedDataParallel, in micro-batches, as docs/privacy.md has it."""
    net = DistributedDataParallel(wide())
    torch.manual_seed(rank)
    x, rule = torch.zeros(2 - rank, 100).double(), pc.NormClip(1.0, 2.0, expected_batch_size=8)
    for last in (False, True):
        with pc.aggregate(net, rule, group=dist.group.WORLD, last=last):
            net(x).sum(1).mean().backward()
    noise = net.module.weight.grad
    std_is(noise, 2.0 / 8)
    other = noise.clone()
    dist.broadcast(other, 0)
    assert other.equal(noise)
    wrong = {"last": rank == 0}
    with pytest.raises(pc.RanksError), pc.aggregate(net, rule, group=dist.group.WORLD, **wrong):
        net(x).sum(1).mean().backward()


@needs_gloo
def test_noise_over_ranks_and_batches() -> None:
    run_ranks(2, check_accumulated_noise)


per_groups: Any = {"a": ["*"]}
test_values = raising(
    ValueError,
    {
        "expected": (
            lambda: pc.NormClip(1.0, expected_batch_size=0),
            "expected_batch_size to be positive, got 0",
        ),
        "one-network": (lambda: pc.NormClip({"a": 1.0}), "one max_norm with per='network'"),
        "groups": (
            lambda: pc.NormClip({"b": 1.0}, per=per_groups),
            "groups a of per, got it for b",
        ),
        "of-group": (
            lambda: pc.NormClip({"a": 0.0}, per=per_groups),
            "max_norm of a to be positive",
        ),
    },
)
test_types = raising(
    TypeError,
    {
        "per": (lambda: pc.NormClip(1.0, per={"a": "*"}), "groups of per as lists"),
        "per-list": (lambda: pc.NormClip(1.0, per=[["*"]]), "groups of per as lists"),
    },
)
