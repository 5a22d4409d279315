"""Ranks that differ all raise, soon, and say how; none waits for another."""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import RankError, needs_gloo, run_ranks, try_ranks
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.errors import RanksError

pytestmark = needs_gloo

SOON = 10


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, other: bool = False, swapped: bool = False) -> Tensor:
        first, second = (self.b, self.a) if swapped else (self.a, self.b)
        x = second(first(x).tanh())
        return self.c(x) if other else x


Step = Callable[[nn.Module, Tensor, int, Any], None]


def other_branch(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.Gram(), group=group):
        model(x, other=rank == 1).sum().backward()


def other_order(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.aggregate(model, pc.Median(), group=group):
        model(x, swapped=rank == 1).sum().backward()


def other_statistics(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.Gram() if rank else pc.SqNorms(), group=group):
        model(x).sum().backward()


def other_verb(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    if rank:
        with pc.aggregate(model, pc.Krum(1), group=group):
            model(x).sum().backward()
    else:
        pc.weighted_sum(model, lambda m, x: m(x).sum(), x, torch.ones(8), group=group)


def error_in_forward(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.SqNorms(), group=group):
        loss = model(x).sum()
        if rank == 1:
            raise ZeroDivisionError
        loss.backward()


def error_in_backward(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    def fail(g: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pc.aggregate(model, pc.Median(), group=group):
        y = model.a(x)
        if rank == 1:
            y.register_hook(fail)
        model.b(y).sum().backward()


def no_backward(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.SqNorms(), group=group):
        loss = model(x).sum()
        if rank != 1:
            loss.backward()


def two_backwards(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.SqNorms(), group=group):
        model.a(x).sum().backward()
        if rank == 1:
            model.c(x).sum().backward()


def no_forward(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    y = torch.zeros((), requires_grad=True)
    with pc.collect(model, pc.SqNorms(), group=group):
        (y if rank == 1 else model(x).sum()).backward()


def error_in_weights(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    def weights(record: pc.Record) -> Tensor:
        if rank == 1:
            raise ZeroDivisionError
        return torch.ones(8)

    pc.weighted_sum(model, lambda m, x: m(x).sum(), x, weights, group=group)


def refused_on_one(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.collect(model, pc.SqNorms(), group=group):
        y = model(x)
        if rank == 1:
            y = model.c(y.mean(0, keepdim=True).expand(4, 4))
        y.sum().backward()


def too_few(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.aggregate(model, pc.Krum(4), group=group):
        model(x).sum().backward()


def error_on_entering(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    if rank == 1:
        model = nn.Sequential(model, nn.BatchNorm1d(4))
    with pc.collect(model, pc.SqNorms(), group=group):
        model(x).sum().backward()


def other_rule(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.aggregate(model, pc.Bulyan(rank), group=group):
        model(x).sum().backward()


def other_rule_inside(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    with pc.aggregate(model, pc.NNM(1, pc.TrimmedMean(rank)), group=group):
        model(x).sum().backward()


def other_centre(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    rule = pc.CenteredClip(0.5)
    value = {name: torch.full_like(p, 1.0 + rank) for name, p in model.named_parameters()}
    rule.centre.load_state_dict(value)
    with pc.aggregate(model, rule, group=group):
        model(x).sum().backward()


def meter_in_the_block(model: nn.Module, x: Tensor, rank: int, group: Any) -> None:
    meter = pc.CoherenceMeter(model)
    meter.update(lambda m, x: m(x).sum(), x)
    with pc.collect(model, pc.SqNorms(), group=group):
        meter.all_reduce(group)
        if rank == 1:
            raise ZeroDivisionError
        model(x).sum().backward()


STEPS: dict[Step, tuple[str, str]] = {
    other_branch: ("RanksError", r"rank 0: .*b\.weight\n.*rank 1: .*c\.weight"),
    other_order: ("RanksError", r"rank 0: exchange of b\.weight\n.*rank 1: exchange of a\.weight"),
    other_statistics: ("RanksError", r"rank 0: outputs sq_norms.*the same statistics, rule"),
    other_verb: ("RanksError", r"the same statistics|left its block"),
    error_in_forward: ("RanksError", r"rank 1 of 2 has raised"),
    error_in_backward: ("RanksError", r"rank 1 of 2 has raised"),
    no_backward: ("RanksError", r"rank 1 of 2 has left its block"),
    two_backwards: ("RanksError", r"rank 0 of 2 has left its block"),
    no_forward: ("RanksError", r"no parameter of the model has met an example on rank 1"),
    error_in_weights: ("RanksError", r"rank 1 of 2 has raised"),
    refused_on_one: ("RanksError", r"rank 1 of 2 has raised"),
    error_on_entering: ("RanksError", r"rank 1 of 2 has raised"),
    other_rule: ("RanksError", r"rank 0: .*'f': 0.*rank 1: .*'f': 1"),
    other_rule_inside: ("RanksError", r"rank 0: .*'k': 0.*rank 1: .*'k': 1"),
    other_centre: ("RanksError", r"rank 0: .*rank 1: "),
    meter_in_the_block: ("RanksError", r"rank 1 of 2 has raised"),
    too_few: ("ValueError", r"needs a batch of 2f \+ 3 = 11 examples or more, got 8"),
}


def check_all_raise(rank: int) -> list[tuple[str, str, float]]:
    found: list[tuple[str, str, float]] = []
    for step in STEPS:
        torch.manual_seed(0)
        model, start = Branches(), time.monotonic()
        try:
            step(model, torch.randn(4, 4), rank, dist.group.WORLD)
            found.append(("", "", 0.0))
        except Exception as error:
            found.append((type(error).__name__, str(error), time.monotonic() - start))
        # The next block is not disturbed.
        with pc.collect(model, pc.Gram(), group=dist.group.WORLD) as record:
            model(torch.randn(4, 4)).sum().backward()
        assert record.gram.shape == (8, 8)
    return found


def test_ranks_that_differ_all_raise() -> None:
    ranks = run_ranks(2, check_all_raise)
    for i, (step, (kind, pattern)) in enumerate(STEPS.items()):
        for rank, found in enumerate(ranks):
            raised, message, seconds = found[i]
            assert raised, f"{step.__name__} raised nothing on rank {rank}"
            assert seconds < SOON, step.__name__
            if rank == 0:
                assert raised == kind, (step.__name__, message)
                assert re.search(pattern, message, re.DOTALL), (step.__name__, message)


def check_death(rank: int) -> None:
    model = Branches()
    with pc.collect(model, pc.SqNorms(), group=dist.group.WORLD):
        loss = model(torch.randn(4, 4)).sum()
        if rank == 1:
            os._exit(1)
        loss.backward()


def test_a_rank_that_dies_ends_the_others() -> None:
    start = time.monotonic()
    found = try_ranks(2, check_death)
    assert time.monotonic() - start < 40
    assert all(isinstance(one, RankError) for one in found)
    assert found[1].kind == "EOFError"
    assert found[0].kind != "TimeoutError", found[0]


def test_ranks_error_is_public() -> None:
    assert issubclass(pc.RanksError, RuntimeError)
    assert pc.RanksError is RanksError
