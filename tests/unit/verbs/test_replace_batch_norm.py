"""BatchNorm layers become GroupNorm layers, and nothing else of the model changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pycoherence as pc


class Block(nn.Module):
    """A residual block that uses one normalisation in two places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.again(self.conv(self.norm(x).relu()))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        Block(6),
        nn.Flatten(),
        nn.Linear(6 * 9, 7),
        nn.BatchNorm1d(7),
        nn.Linear(7, 2),
    )


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 5, 5), torch.arange(rows) % 2


def test_each_layer_is_replaced_and_listed_and_the_model_can_be_measured_and_trained() -> None:
    model = network()
    with pytest.raises(pc.UnsupportedError, match=r"pc\.replace_batch_norm\(model\)"):
        pc.collect(model, pc.SqNorms()).__enter__()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = pc.replace_batch_norm(model)
    assert list(found) == ["1", "2.norm", "2.again", "5"]
    assert all(isinstance(layer, nn.GroupNorm) for layer in found.values())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in named.items()
    }
    assert not pc.verify(model, loss_fn, batch()).failures
    data, losses = batch(), []
    for _ in range(20):
        optimizer.zero_grad()
        with pc.collect(model, pc.SqNorms()) as record:
            loss = loss_fn(model, data)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert record.coherence().n == 5
    assert losses[-1] < losses[0] / 2


def test_a_shared_layer_stays_one_layer() -> None:
    model = Block(4)
    found = pc.replace_batch_norm(model)
    assert model.norm is model.again is found["norm"] is found["again"]


def test_a_shared_block_is_replaced_in_all_places() -> None:
    block = Block(4)
    model = nn.ModuleList([block, block])
    found = pc.replace_batch_norm(model)
    assert list(found) == ["0.norm", "0.again", "1.norm", "1.again"]
    assert len(set(found.values())) == 1


def test_values_modes_dtypes_and_frozen_parameters_are_kept() -> None:
    layer = nn.BatchNorm2d(6, eps=1e-3, dtype=torch.float64).eval()
    nn.init.normal_(layer.weight)
    layer.bias.requires_grad_(False)
    weight = layer.weight.detach().clone()
    new = pc.replace_batch_norm(nn.Sequential(layer))["0"]
    assert isinstance(new, nn.GroupNorm)
    assert torch.equal(new.weight, weight)
    assert new.weight.dtype == torch.float64
    assert (new.eps, new.training, new.bias.requires_grad) == (1e-3, False, False)
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    truth = F.group_norm(x, 3, layer.weight, layer.bias, 1e-3)
    torch.testing.assert_close(new(x), truth)


def test_a_layer_without_parameters_gets_none() -> None:
    new = pc.replace_batch_norm(nn.Sequential(nn.BatchNorm2d(6, affine=False)))["0"]
    assert not list(new.parameters())
    bare = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    assert not list(pc.replace_batch_norm(nn.Sequential(bare))["0"].parameters())


def test_a_model_that_is_a_layer_is_returned() -> None:
    layer = nn.BatchNorm2d(6)
    found = pc.replace_batch_norm(layer)
    assert list(found) == [""]
    assert found[""].weight is layer.weight


def test_a_model_without_such_layers_stays() -> None:
    model = nn.Linear(2, 2)
    assert pc.replace_batch_norm(model) == {}


@pytest.mark.parametrize(
    ("channels", "groups", "number"),
    [(64, 32, 32), (48, 32, 24), (37, 32, 1), (32, 32, 16), (6, 4, 3), (2, 8, 1), (1, 8, 1)],
)
def test_groups_divide_the_channels_and_have_two_or_more(channels, groups, number) -> None:
    model = nn.Sequential(nn.BatchNorm2d(channels))
    new = pc.replace_batch_norm(model, groups)["0"]
    assert isinstance(new, nn.GroupNorm)
    assert new.num_groups == number


@given(channels=st.integers(1, 200), groups=st.integers(1, 64))
def test_any_channels_can_be_grouped(channels: int, groups: int) -> None:
    new = pc.replace_batch_norm(nn.BatchNorm3d(channels), groups)[""]
    assert isinstance(new, nn.GroupNorm)
    assert new.num_groups <= groups
    assert new(torch.randn(1, channels, 1, 1, 2)).shape == (1, channels, 1, 1, 2)


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3)])
def test_one_dimension_is_normalised_as_a_whole(shape) -> None:
    new = pc.replace_batch_norm(nn.BatchNorm1d(8))[""]
    x = torch.randn(shape)
    torch.testing.assert_close(new(x), F.layer_norm(x, shape[1:]))


def test_layers_of_several_processes_are_replaced() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert len(pc.replace_batch_norm(model)) == 4
    assert not pc.verify(model, loss_fn, batch()).failures


def test_hooks_go_on_and_can_be_removed() -> None:
    model, calls = nn.Sequential(nn.BatchNorm2d(4)), []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    pc.replace_batch_norm(model)
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    model(x).square().sum().backward()
    assert calls == ["after", "backward"]
    handle.remove()
    model(x)
    assert calls == ["after", "backward"]


def test_norm_is_given_the_layer_and_keeps_its_parameters() -> None:
    model = network().double()
    weight = model[1].weight
    found = pc.replace_batch_norm(model, norm=lambda old: nn.GroupNorm(1, old.num_features))
    assert found["1"].weight is weight
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not pc.verify(model, loss_fn, (batch()[0].double(), batch()[1])).failures
    found = pc.replace_batch_norm(network(), norm=lambda _: nn.Identity())
    assert all(isinstance(layer, nn.Identity) for layer in found.values())


class Activated(nn.BatchNorm2d):
    """BatchNorm and an activation in one, as some collections of models have it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Holding(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()


@pytest.mark.parametrize(
    ("layer", "why"), [(Activated(4), "a forward of its own"), (Holding(4), "also holds act")]
)
def test_layers_that_do_more_are_refused_and_nothing_is_replaced(layer, why: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), layer)
    before = copy.deepcopy(model)
    with pytest.raises(pc.UnsupportedError, match=rf"module '1'.*{why}.*norm="):
        pc.replace_batch_norm(model)
    assert [type(m) for m in model] == [type(m) for m in before]
    assert list(pc.replace_batch_norm(model, norm=lambda _: nn.ReLU())) == ["0", "1"]


def test_lazy_layers_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(pc.UnsupportedError, match="one batch first"):
        pc.replace_batch_norm(model)
    model(torch.randn(2, 4, 3, 3))
    assert list(pc.replace_batch_norm(model)) == ["0"]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        pc.replace_batch_norm(3)  # pyright: ignore
    with pytest.raises(TypeError, match="groups to be a whole number"):
        pc.replace_batch_norm(network(), 2.5)  # pyright: ignore
    with pytest.raises(ValueError, match="groups to be 1 or more"):
        pc.replace_batch_norm(network(), 0)
    with pytest.raises(TypeError, match="norm to give a module, got int"):
        pc.replace_batch_norm(network(), norm=lambda _: 3)  # pyright: ignore
