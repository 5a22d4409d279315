"""Models that are parallel by layers' slices, and sharded by FSDP2 over another dimension."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pycoherence as pc


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.up(x).relu()))


def check(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "slices"))
    torch.manual_seed(0)
    net = Net().double()
    alone = copy.deepcopy(net)
    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(net, mesh["slices"], styles)
    for module in (net.up, net.down, net):
        fully_shard(module, mesh=mesh["data"])
    x, y = torch.randn(8, 5, 6).double(), torch.randint(4, (8, 5))
    parts = [slice(0, 4), slice(4, 8)]
    mine = parts[rank // 2]

    def loss(model: nn.Module, part: slice) -> Tensor:
        return F.cross_entropy(model(x[part]).mT, y[part])

    for _ in range(2):
        for statistics in ([pc.SqNorms(), pc.Gram()], [pc.SqNorms()]):
            net.zero_grad()
            with pc.collect(net, *statistics) as record:
                loss(net, mine).backward()
            with pc.collect(alone, *statistics) as expected:
                loss(alone, mine).backward()
            torch.testing.assert_close(record.sq_norms, expected.sq_norms)
            torch.testing.assert_close(record.coherence().m, expected.coherence().m)
            compare(net, alone, [pc.Winsorized(0)], loss, parts, run=False)
        compare(net, alone, [pc.Median(), pc.Winsorized(1)], loss, [mine, *parts])
    with (
        pytest.raises(pc.UnsupportedError, match=r"group= cannot be given together"),
        pc.collect(net, pc.SqNorms(), group=mesh["data"]),
    ):
        loss(net, mine).backward()


def compare(
    net: nn.Module, alone: nn.Module, rules: Any, loss: Any, parts: Any, *, run: bool = True
) -> None:
    """Rules are taken over the examples of each pair of ranks, and their results averaged."""
    for rule in rules:
        if run:
            net.zero_grad()
            with pc.aggregate(net, rule):
                loss(net, parts[0]).backward()
        alone.zero_grad()
        for part in parts[-2:]:
            with pc.aggregate(alone, rule):
                (loss(alone, part) / 2).backward()
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            grad: Any = p.grad
            torch.testing.assert_close(grad.full_tensor(), q.grad)


@pytest.mark.slow
@needs_gloo
def test_slices_and_shards() -> None:
    run_ranks(4, check)
