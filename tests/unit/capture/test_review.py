"""What a review of the capture found: each was a wrong number, or an error without need."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import normal, uses
from support.checks import assert_norms
from support.oracle import per_example_gradients
from support.settings import threads
from support.shown import shown
from torch import Tensor, nn

import pycoherence as pc

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_a_bias_that_is_broadcast_is_exact(dims: int) -> None:
    weight, bias = normal(4, 3), normal(*(1,) * dims)
    model = uses(lambda m, x: F.linear(x, m.weight, m.bias), weight=weight, bias=bias)().double()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0]).square().sum(1).mean()

    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, (X,)).backward()
    assert_norms(record, per_example_gradients(model, loss, (X,)), 1e-10)


class Rerun(torch.autograd.Function):
    """Runs a layer without a graph, and again in its backward."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.layer(x), grads[0])
        return None, x.grad


def rerun(model: nn.Module, x: Tensor) -> Tensor:
    return Rerun.apply(model[1], model[0](x)).square().mean()


@shown
def test_a_function_that_runs_a_layer_again_in_its_backward_is_exact() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()

    def plain(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0]).square().mean(1).mean()

    with pc.collect(model, pc.SqNorms()) as record:
        rerun(model, X).backward()
    assert_norms(record, per_example_gradients(model, plain, (X,)), 1e-10)


@shown
def test_such_a_function_of_a_layer_that_is_also_used_elsewhere_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with pc.collect(model, pc.SqNorms()) as record:
        loss = rerun(model, model[1](X))
        with pytest.raises(pc.UnsupportedError, match=r"module '1'.*inside this one"):
            loss.backward()
    with pytest.raises(RuntimeError, match="not complete"):
        _ = record.sq_norms
    assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())
    with pytest.raises(pc.UnsupportedError, match=r"module '1'.*inside this one"):
        pc.CoherenceMeter(model).update(rerun, X)


class Behind(torch.autograd.Function):
    """Adds to the gradient of a parameter in a pass that no mode sees."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            ctx.layer(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
        return None, grads[0]


def test_a_backward_pass_that_is_not_seen_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with pc.collect(model, pc.SqNorms()) as record:
        loss = model[0](Behind.apply(model[1], X.clone().requires_grad_())).sum()
        with pytest.raises(pc.UnsupportedError, match=r"module '1'.*inside this one"):
            loss.backward()
    with pytest.raises(RuntimeError, match="not complete"):
        _ = record.sq_norms


@pytest.mark.parametrize("shape", [(5, 6, 3), (5, 2, 6, 3)], ids=str)
def test_a_linear_output_of_many_dimensions_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0]).square().flatten(1).sum(1).mean()

    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, (x,)).backward()
    assert_norms(record, per_example_gradients(model, loss, (x,)), 1e-10)


def test_parameters_are_those_of_entering_the_block() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[0].requires_grad_(False)
    block = pc.collect(model, pc.SqNorms())
    model[0].requires_grad_(True)
    with block as record:
        model(X).sum().backward()
    assert set(record.by_parameter) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_parameter_replaced_inside_the_block_is_noticed() -> None:
    model = nn.Linear(3, 3).double()
    with pc.collect(model, pc.SqNorms()):
        model.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
        loss = model(X).sum()
        with pytest.raises(RuntimeError, match=r"replaced.*weight"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_meter_adds_gradients_that_were_not_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(16, 4).to(dtype), torch.randn(64, 16, dtype=dtype)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return 1e-4 * model(x).square().mean(1).mean()

    meter = pc.CoherenceMeter(model)
    meter.update(loss, x)
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, x).backward()
    assert meter.compute().m == pytest.approx(record.coherence().m, rel=1e-5)


def test_a_gradient_that_fails_elsewhere_leaves_the_record_whole() -> None:
    model = nn.Linear(3, 2).double()
    unrelated = torch.ones(2, requires_grad=True)
    with pc.collect(model, pc.SqNorms()) as record:
        loss = model(X).sum()
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(loss, unrelated, retain_graph=True)
        loss.backward()
    assert record.sq_norms.shape == (4,)


def test_a_call_that_fails_has_not_happened() -> None:
    model = nn.Linear(3, 2).double()
    with pc.collect(model, pc.SqNorms()) as record:
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.randn(7, 5, dtype=torch.float64))
        model(X).sum().backward()
    assert record.batch_size == 4


@pytest.mark.parametrize("shape", [(200_001,), (1, 100_000), (40_000, 3)], ids=str)
def test_coherence_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    from pycoherence.capture.results import row_norms
    from pycoherence.statistics import sum_sq_norm

    x = torch.randn(shape)
    found = set()
    for n in (1, 2, 4):
        with threads(n):
            for raw in ({"sum_norms": row_norms(x)}, {"weighted_sum": x}):
                found.add((*raw, sum_sq_norm(raw).item()))
    assert len(found) == 2


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_record_holds_no_graph() -> None:
    model = nn.Linear(3, 2).double()
    with pc.collect(model, pc.SqNorms()) as record:
        model(X).square().sum().backward(create_graph=True)
    assert not record.sq_norms.requires_grad
    model.weight.grad = model.bias.grad = None


def test_verify_accepts_infinite_gradients_on_both_sides() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1.0], [torch.inf], [2.0]], dtype=torch.float64)
    assert not pc.verify(model, lambda model, x: model(x).mean(), x).failures
