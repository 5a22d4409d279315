"""Sharded training by FSDP2: statistics of the rank's own batch, gradients as ever."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import pycoherence as pc

Batch = tuple[Tensor, Tensor]


class Words(nn.Module):
    """Tied embedding, a group that is called twice, frozen and unused layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.unused = nn.Linear(8, 8)
        self.first[3].requires_grad_(False)

    @property
    def groups(self) -> list[nn.Module]:
        return [self.first, self.twice, self.unused]

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.twice(self.twice(self.first(self.embed(ids)))), self.embed.weight)


class Recomputed(Words):
    """The same, with one group run again in the backward pass."""

    def forward(self, ids: Tensor) -> Tensor:
        x = checkpoint(self.first, self.embed(ids), use_reentrant=False)
        return F.linear(self.twice(self.twice(x)), self.embed.weight)


class Pair(nn.Module):
    """A layer of two inputs, one of them given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Bilinear(8, 8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, *, other: dict[str, Tensor]) -> Tensor:
        return self.layer(x, other["y"]) + self.norm(other["y"])


class Times(nn.Module):
    """Groups see the batch second, rows of all words, two inputs, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(9, 8), nn.Parameter(torch.randn(5, 8))
        self.place = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.lstm, self.rows, self.pair = nn.LSTM(8, 8), nn.Linear(8, 8), Pair()
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 9)

    @property
    def groups(self) -> list[nn.Module]:
        return [self.place, self.lstm, self.rows, self.pair, self.attend]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y, _ = self.lstm((x + self.place(self.places)).transpose(0, 1))
        y = y.transpose(0, 1)
        z = self.rows(y.reshape(-1, 8)).view_as(x)
        return self.head(self.attend(self.pair(z, other={"y": y})))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).mT.float(), batch[1])


def batch_of(seed: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(9, (size, 5), generator=generator) for _ in range(2))  # pyright: ignore


class Sharded:
    """A model of FSDP2, and the same one whole.

    Args:
        net: The model, of which all groups are sharded, and what is left.
        sizes: Of the batches of the ranks.
        options: Of `fully_shard`.
    """

    def __init__(self, net: nn.Module, *sizes: int, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        world = dist.get_world_size()
        self.rank, self.sizes = dist.get_rank(), sizes or (4,) * world
        self.plain = copy.deepcopy(net)
        options.setdefault("mesh", init_device_mesh("cpu", (world,)))
        for group in getattr(net, "groups", ()):
            fully_shard(group, **options)
        self.model = fully_shard(net, **options)
        # As an optimizer does, since the root's are not on the model after a forward pass.
        self.shards = dict(self.model.named_parameters())

    def batches(self, step: int) -> list[Batch]:
        return [batch_of(10 * step + r, size) for r, size in enumerate(self.sizes)]

    def clear(self) -> None:
        for p in (*self.shards.values(), *self.plain.parameters()):
            p.grad = None

    def check(self, *steps: int, **tolerance: float) -> None:
        """Compare blocks, whose gradients are added up."""
        self.clear()
        for step in steps:
            batches = self.batches(step)
            with pc.collect(self.model, pc.SqNorms(), pc.Gram()) as found:
                loss(self.model, batches[self.rank]).backward()
            apart = copy.deepcopy(self.plain)
            with pc.collect(apart, pc.SqNorms(), pc.Gram()) as expected:
                loss(apart, batches[self.rank]).backward()
            assert found.by_parameter.keys() == expected.by_parameter.keys()
            for name, each in expected.by_parameter.items():
                mine = found.by_parameter[name]
                torch.testing.assert_close(mine.sq_norms, each.sq_norms, **tolerance)
                torch.testing.assert_close(mine.gram, each.gram, **tolerance)
            for batch in batches:
                (loss(self.plain, batch) / len(batches)).backward()
        self.check_gradients(**tolerance)

    def check_gradients(self, **tolerance: float) -> None:
        for (name, p), q in zip(self.shards.items(), self.plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                full = p.grad.full_tensor()  # pyright: ignore
                torch.testing.assert_close(full, q.grad.to(full.dtype), **tolerance)  # pyright: ignore

    def check_rule(self, rule: Any) -> None:
        """Compare with the mean of what the rule gives on each rank."""
        self.clear()
        means = [torch.zeros_like(p) for p in self.plain.parameters()]
        batches = self.batches(0)
        for batch in batches:
            self.plain.zero_grad()
            with pc.aggregate(self.plain, rule):
                loss(self.plain, batch).backward()
            for mean, p in zip(means, self.plain.parameters(), strict=True):
                mean += 0 if p.grad is None else p.grad / len(batches)
        for mean, p in zip(means, self.plain.parameters(), strict=True):
            p.grad = None if p.grad is None else mean
        with pc.aggregate(self.model, rule):
            loss(self.model, batches[self.rank]).backward()
        self.check_gradients()


def net(kind: Callable[[], nn.Module] = Words) -> Any:
    torch.manual_seed(0)
    return kind().double()


def check_steps(rank: int) -> None:
    both = Sharded(net())
    both.check(0)
    with torch.no_grad():
        both.model(both.batches(0)[rank][0])
    both.check(1)
    both.model(both.batches(0)[rank][0])  # the root stays whole
    both.check(2, 3)
    both.model.eval()
    both.check(4)
    both.check_rule(pc.Winsorized(1))


def check_measures(rank: int) -> None:
    both = Sharded(net(), 3, 4)
    own = both.batches(0)[rank]
    meters = pc.CoherenceMeter(both.model), pc.CoherenceMeter(both.plain)
    for step in range(2):
        for meter, model in zip(meters, (both.model, both.plain), strict=True):
            meter.update(loss, both.batches(step)[rank])
        both.model(own[0])
    found, expected = (meter.compute() for meter in meters)
    assert found.m == pytest.approx(expected.m)
    assert found.by_parameter == pytest.approx(expected.by_parameter)
    sums = [
        pc.weighted_sum(model, loss, own, lambda r: 1 / r.sq_norms)
        for model in (both.model, both.plain)
    ]
    torch.testing.assert_close(*sums)
    assert all(p.grad is None for p in both.shards.values())
    both.check(0)
    torch.optim.SGD(both.shards.values(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="weights have changed"):
        meters[0].update(loss, own)


def check_refusals(rank: int) -> None:
    both = Sharded(net())
    own = both.batches(0)[rank]
    for size in (4, 1):
        for rule in (pc.NormClip(0.1), pc.Krum(1)):
            words = r"'embed'.*fully_shard reduces gradients.*give group=, or use a rule over"
            with pytest.raises(pc.UnsupportedError, match=words), pc.aggregate(both.model, rule):
                loss(both.model, (own[0][:size], own[1][:size])).backward()
    with pytest.raises(pc.UnsupportedError, match=r"verify the model before fully_shard"):
        pc.verify(both.model, loss, own)
    both.check(0)


def run_basics(rank: int) -> None:
    check_steps(rank)
    check_measures(rank)
    check_refusals(rank)
    Sharded(net(Times)).check(0, 1)


@needs_gloo
def test_two_processes() -> None:
    run_ranks(2, run_basics)
