"""Statistics and rules over the examples of all ranks on models that FSDP2 has sharded."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pycoherence as pc

pytestmark = needs_gloo


class Net(nn.Module):
    """A tied table, and a group of layers that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.first = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU())
        self.twice = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.twice(self.twice(self.first(self.table(ids)))), self.table.weight)


def check(rank: int, sizes: tuple[int, ...], dims: tuple[int, ...], options: Any) -> None:
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("copies", "shards")[-len(dims) :])
    torch.manual_seed(0)
    net = Net().double()
    alone = copy.deepcopy(net)
    for module in (net.first, net.twice, net):
        fully_shard(module, mesh=mesh, **options)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rules = [pc.Winsorized(1), pc.Median(), pc.Krum(1), pc.NormClip(0.1), pc.Bulyan(1)]
    for step, rule in enumerate(rules):
        generator = torch.Generator().manual_seed(step)
        ids, classes = (torch.randint(9, (sum(sizes), 5), generator=generator) for _ in range(2))

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x).mT, y, reduction="none").mean(1).mean()

        with pc.collect(net, pc.SqNorms(), pc.Gram(), pc.Dots("mean"), group=mesh) as record:
            loss(net, ids[mine], classes[mine]).backward()
        with pc.collect(alone, pc.SqNorms(), pc.Gram(), pc.Dots("mean")) as whole:
            loss(alone, ids, classes).backward()
        for name in ("sq_norms", "gram", "dots"):
            torch.testing.assert_close(getattr(record, name), getattr(whole, name))
        with pc.collect(net, pc.SqNorms(), group=mesh) as record:
            loss(net, ids[mine], classes[mine]).backward()
        assert record.coherence().m == pytest.approx(whole.coherence().m)
        net.zero_grad()
        alone.zero_grad()
        with pc.aggregate(alone, rule) as expected:
            loss(alone, ids, classes).backward()
        with pc.aggregate(net, rule, group=mesh) as found:
            loss(net, ids[mine], classes[mine]).backward()
        for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
            grad: Any = p.grad
            assert grad.placements == p.placements  # pyright: ignore
            torch.testing.assert_close(grad.full_tensor(), q.grad, msg=name)
        assert found.report.batch_size == expected.report.batch_size


@pytest.mark.parametrize(
    ("sizes", "dims"), [((3, 6), (2,)), ((4, 0, 5), (3,)), ((2, 2, 1, 4), (2, 2))]
)
def test_sharded_models(sizes: tuple[int, ...], dims: tuple[int, ...]) -> None:
    run_ranks(len(sizes), check, sizes, dims, {})


@pytest.mark.slow
def test_without_resharding() -> None:
    run_ranks(2, check, (3, 6), (2,), {"reshard_after_forward": False})


def check_accumulation(rank: int, **options: Any) -> None:
    mesh, sizes = init_device_mesh("cpu", (2,)), (4, 6)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for rule in (pc.Median(), pc.Krum(1)):
        torch.manual_seed(0)
        net: Any = Net().double()
        alone = copy.deepcopy(net)
        if "ignored_params" in options:
            options["ignored_params"] = set(net.twice.parameters())
        for module in (net.first, net.twice, net):
            fully_shard(module, mesh=mesh, **options)
        shards = dict(net.named_parameters())
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randint(9, (sum(sizes), 5), generator=generator) for _ in range(2))
            net.set_requires_gradient_sync(step == 1)
            for model, part, group in ((alone, slice(None), None), (net, mine, mesh)):
                with pc.aggregate(model, rule, group=group):
                    F.cross_entropy(model(x[part]).mT, y[part]).backward()
        for (name, p), q in zip(shards.items(), alone.parameters(), strict=True):
            grad: Any = p.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(whole, q.grad, msg=name)


def check_accumulations(rank: int) -> None:
    from torch.distributed.tensor import Shard

    check_accumulation(rank)
    check_accumulation(rank, ignored_params=None)
    check_accumulation(rank, shard_placement_fn=lambda p: Shard(p.dim() - 1))


@pytest.mark.slow
def test_accumulated_batches() -> None:
    run_ranks(2, check_accumulations)


def check_noise(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model: Any = nn.Linear(200, 50, bias=False).double()
    fully_shard(model, mesh=mesh)
    x = torch.zeros(2 + rank, 200, dtype=torch.float64)
    rule, optimizer = pc.NormClip(1.0, 2.0), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for last in (False, True):
            options: Any = {"group": mesh, "loss_reduction": "sum", "last": last}
            with pc.aggregate(model, rule, **options):
                model(x).sum().backward()
        optimizer.step()
    whole = model.weight.grad.full_tensor()
    assert abs(whole.std().item() - 2.0) < 0.05
    assert not whole[:25].equal(whole[25:])
    with pc.aggregate(model, rule, group=mesh, loss_reduction="sum", last=False):
        model(x).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="noise of that step was never added"):
        pc.aggregate(model, rule, group=mesh).__enter__()


def test_noise_is_added_once() -> None:
    run_ranks(2, check_noise)


def check_refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=mesh)
    x, alone = torch.randn(5, 4), dist.new_group([rank], use_local_synchronization=True)
    for rule in (pc.Median(), pc.Krum(1)):
        for size in (5, 1):
            with (
                pytest.raises(pc.UnsupportedError, match=r"averages over the ranks \[0, 1\]"),
                pc.aggregate(model, rule, group=alone),
            ):
                model(x[:size]).sum().backward()
    with pc.collect(model, pc.SqNorms(), group=alone) as record:
        model(x).sum().backward()
    assert record.batch_size == 5
    model.set_gradient_divide_factor(4.0)
    with (
        pytest.raises(pc.UnsupportedError, match="set_gradient_divide_factor"),
        pc.aggregate(model, pc.Median(), group=mesh),
    ):
        model(x)


def test_other_averages_are_refused() -> None:
    run_ranks(2, check_refusals)
