"""Data-parallel training: statistics of the rank's own batch, gradients as ever."""

import copy

import pytest
import torch
import torch.distributed as dist
from support.ranks import needs_gloo, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pycoherence as pc


class Shared(nn.Module):
    """One layer called twice, one used as it is and made into something else, one not used."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.twice, self.layer, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return self.layer(self.twice(self.twice(x).tanh())) @ self.layer.weight.exp()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def grads(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]


def check_steps(rank: int, again: bool, **options: bool) -> None:
    torch.manual_seed(0)
    net = Shared(again).double()
    plain = DistributedDataParallel(copy.deepcopy(net), **options)
    ours = DistributedDataParallel(net, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(2 * step + rank)
        x = torch.randn(4 + rank, 6, generator=generator).double()
        loss(plain, x).backward()
        alone = copy.deepcopy(net)
        with pc.collect(ours, pc.SqNorms()) as record:
            loss(ours, x).backward()
        with pc.collect(alone, pc.SqNorms()) as expected:
            loss(alone, x).backward()
        torch.testing.assert_close(record.sq_norms, expected.sq_norms)
        torch.testing.assert_close(grads(ours), grads(plain))


def check_rules(rank: int) -> None:
    net = Shared(False).double()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).double()
    ours = DistributedDataParallel(net, find_unused_parameters=True)
    alone = copy.deepcopy(net)
    for rule, synced in ((pc.Winsorized(1), True), (pc.NormClip(0.1), False)):
        ours.zero_grad()
        alone.zero_grad()
        with pc.aggregate(alone, rule):
            loss(alone, x).backward()
        expected = grads(alone)
        if synced:
            for g in expected:
                dist.all_reduce(g)
                g /= 2
            with pc.aggregate(ours, rule):
                loss(ours, x).backward()
        else:
            with pytest.raises(pc.UnsupportedError, match=r"no_sync"), pc.aggregate(ours, rule):
                loss(ours, x)
            with ours.no_sync(), pc.aggregate(ours, rule):
                loss(ours, x).backward()
        torch.testing.assert_close(grads(ours), expected)


def check_join(rank: int) -> None:
    """A rank with fewer batches joins; the others measure their own as ever."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2).double()
    plain, ours = (DistributedDataParallel(copy.deepcopy(net)) for _ in range(2))
    batches = [torch.randn(3, 6).double() for _ in range(2 + rank)]
    with Join([plain]):
        for x in batches:
            loss(plain, x).backward()
    with Join([ours]):
        for x in batches:
            with pc.collect(ours, pc.SqNorms()) as record:
                loss(ours, x).backward()
            with pc.collect(net, pc.SqNorms()) as expected:
                loss(net, x).backward()
            torch.testing.assert_close(record.sq_norms, expected.sq_norms)
    torch.testing.assert_close(grads(ours), grads(plain))


def run(rank: int) -> None:
    check_steps(rank, False, find_unused_parameters=True)
    check_steps(rank, True, static_graph=True)
    check_rules(rank)
    check_join(rank)


@pytest.mark.slow
@needs_gloo
def test_two_processes() -> None:
    run_ranks(2, run)


def test_data_parallel_is_refused() -> None:
    model = nn.DataParallel(nn.Linear(3, 2))
    model.device_ids = [0, 1]
    for name, net in (("the model itself", model), ("module '0'", nn.Sequential(model))):
        with pytest.raises(pc.UnsupportedError, match=rf"{name}.*DistributedDataParallel"):
            pc.collect(net, pc.SqNorms())


def test_data_parallel_on_one_device_is_its_module() -> None:
    model = nn.DataParallel(nn.Linear(3, 2))
    if len(model.device_ids) > 1:
        pytest.skip("needs a machine with no more than one GPU")
    device = next(model.parameters()).device
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        model(torch.ones(4, 3, device=device)).sum().backward()
    assert record.by_parameter["module.bias"].sq_norms.tolist() == [2.0] * 4
