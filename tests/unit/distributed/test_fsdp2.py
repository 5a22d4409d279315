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
        for meter in meters:
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


def check_options(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    Sharded(net(), reshard_after_forward=False).check(0, 1)
    Sharded(net(Times), 2, 5, shard_placement_fn=lambda p: Shard(p.dim() - 1)).check(0)
    for sizes in ((1, 3), (1, 1)):
        Sharded(net(Recomputed), *sizes).check(0, 1)
    whole = net()
    kept = Sharded(whole, 4, 5, ignored_params=set(whole.twice.parameters()))
    kept.clear()
    own = kept.batches(0)[rank]
    with pc.collect(kept.model, pc.SqNorms()) as found:
        loss(kept.model, own).backward()
    with pc.collect(kept.plain, pc.SqNorms()) as expected:
        loss(kept.plain, own).backward()
    torch.testing.assert_close(found.sq_norms, expected.sq_norms)
    for name in ("twice.0.weight", "twice.0.bias"):
        torch.testing.assert_close(kept.shards[name].grad, kept.plain.get_parameter(name).grad)
    # Half precision: the same numbers as of a copy in it, whose gradients are then averaged.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half = Sharded(net(Times).float(), mp_policy=policy)
    half.plain.bfloat16()
    half.check(0, rtol=2e-2, atol=4e-3)


def check_accumulation(rank: int) -> None:
    both = Sharded(net(), 4, 2)
    both.model.set_requires_gradient_sync(False)
    both.clear()
    for step in range(2):
        both.model.set_requires_gradient_sync(step == 1)
        batches = both.batches(step)
        with pc.collect(both.model, pc.SqNorms()) as found:
            loss(both.model, batches[rank]).backward()
        apart = copy.deepcopy(both.plain)
        with pc.collect(apart, pc.SqNorms()) as expected:
            loss(apart, batches[rank]).backward()
        torch.testing.assert_close(found.sq_norms, expected.sq_norms)
        for batch in batches:
            (loss(both.plain, batch) / len(batches)).backward()
    both.check_gradients()
    both.model.set_reshard_after_backward(False)
    both.check(0, 1)


def check_wrapped(rank: int) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    words = net()
    words.first, words.twice = checkpoint_wrapper(words.first), checkpoint_wrapper(words.twice)
    both = Sharded(words, 4, 5)
    both.check(0, 1)
    both.check_rule(pc.TrimmedMean(1))
    tied = Sharded(net(Recomputed), 4, 5)
    tied.check(0)
    tied.check_rule(pc.Median())


class Odd(Words):
    """A function that nobody has described."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(torch.linalg.solve(self.unused.weight, self.embed(ids).mT).mT)
        return F.linear(self.twice(x), self.embed.weight)


def check_skipped(rank: int) -> None:
    both = Sharded(net(Odd))
    both.model.unused.unshard()
    own = both.batches(0)[rank]
    with pc.collect(both.plain, pc.SqNorms(), on_unsupported="skip") as expected:
        loss(both.plain, own).backward()
    with pc.collect(both.model, pc.SqNorms(), on_unsupported="skip") as found:
        loss(both.model, own).backward()
    assert found.skipped == expected.skipped == ["unused.weight"]
    torch.testing.assert_close(found.sq_norms, expected.sq_norms)


def check_others(rank: int) -> None:
    """Factors that are kept, casts, and gradients that are asked for by name."""
    both = Sharded(net().float(), 4, 5)
    own = both.batches(0)[rank]
    found: list[Any] = []
    for model in (both.plain, both.model):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pc.collect(model, pc.SqNorms(), keep_factors=True) as record,
        ):
            loss(model, own).backward()
        found.append((record.sq_norms, record.weighted_sum(1 / record.sq_norms)))
    torch.testing.assert_close(*found)
    both.model(own[0])
    found.clear()
    for model in (both.plain, both.model):
        with pc.collect(model, pc.SqNorms()) as record:
            value = loss(model, own)
            (grad,) = torch.autograd.grad(value, [model.get_parameter("embed.weight")])
        found.append(grad)
    torch.testing.assert_close(*found)


def run_options(rank: int) -> None:
    for check in (check_options, check_accumulation, check_wrapped, check_skipped, check_others):
        check(rank)


@pytest.mark.slow
@needs_gloo
def test_options() -> None:
    run_ranks(2, run_options, timeout=120)


def run_hybrid(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    both = Sharded(net(), 3, 4, 5, 4, mesh=mesh)
    both.check(0, 1)
    both.check_rule(pc.Winsorized(1))
    smaller = Sharded(net(), reshard_after_forward=2)
    smaller.check(0)
    smaller.model(smaller.batches(0)[rank][0])
    smaller.check(1, 2)


@pytest.mark.slow
@needs_gloo
def test_four_processes() -> None:
    run_ranks(4, run_hybrid, timeout=120)


def run_pipeline(rank: int) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    layer = nn.Linear(3, 2)
    stage = PipelineStage(layer, 0, 1, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda x, y: (x - y).square().mean())
    with pytest.raises(RuntimeError) as wrapped, pc.collect(layer, pc.SqNorms()):
        schedule.step(torch.ones(4, 3), target=torch.ones(4, 2))
    assert isinstance(wrapped.value.__cause__, pc.UnsupportedError)
    assert "torch.distributed.pipelining" in str(wrapped.value.__cause__)


@pytest.mark.slow
@needs_gloo
def test_pipelines_are_refused() -> None:
    run_ranks(1, run_pipeline)


def test_other_wrappers_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    engine = type("DeepSpeedEngine", (nn.Module,), {})
    pipeline = type("PipelineEngine", (engine,), {})
    flat = "FullyShardedDataParallel"
    kinds = {FullyShardedDataParallel: flat, engine: engine.__name__, pipeline: engine.__name__}
    for kind, name in kinds.items():
        model = kind.__new__(kind)  # FSDP1 takes no CPU
        nn.Module.__init__(model)
        model._modules["_fsdp_wrapped_module"] = nn.Linear(3, 2)
        for net, words in ((model, "the model itself"), (nn.Sequential(model), "module '0'")):
            with pytest.raises(pc.UnsupportedError, match=rf"{words} \({name}\).*fully_shard"):
                pc.CoherenceMeter(net)
