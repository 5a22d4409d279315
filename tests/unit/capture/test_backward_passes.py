"""Backward passes that are repeated, fail half way, or are not loss.backward()."""

import pytest
import torch
import torch.nn.functional as F
from support.checks import (
    plain_pass,
    relative_error,
)
from support.models import X, classification, make, two_layers
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc

F64 = torch.float64


def test_losses_of_separate_heads_may_be_run_one_by_one() -> None:
    model = nn.ModuleDict(two_layers()).double()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        model["a"](X).sum().backward()
        model["b"](X[:, :4]).sum().backward()
    assert record.by_parameter["a.bias"].sq_norms.tolist() == [4.0] * 5
    assert record.by_parameter["b.bias"].sq_norms.tolist() == [3.0] * 5


def test_losses_run_one_by_one_through_a_shared_trunk_are_refused() -> None:
    """The norm of a sum is not the sum of the norms."""
    model = nn.ModuleDict(two_layers()).double()
    with pc.collect(model, pc.SqNorms()) as record:
        hidden = model["a"](X)
        hidden.sum().backward(retain_graph=True)
        norms, before = record.sq_norms, Snapshot(model)
        with pytest.raises(RuntimeError, match=r"expected one backward pass.*got a second"):
            model["b"](hidden).square().sum().backward()
        before.assert_unchanged(model)
    assert torch.equal(record.sq_norms, norms)


def test_a_pass_that_fails_half_way_leaves_no_half_results() -> None:
    model = nn.ModuleDict(two_layers()).double()

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError

    with pc.collect(model, pc.SqNorms()) as record:
        hidden = model["a"](X)
        loss = model["b"](hidden).square().sum()
        hidden.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    for read in (lambda: record.sq_norms, lambda: record.by_parameter, record.coherence):
        with pytest.raises(RuntimeError, match="backward"):
            read()


def test_a_backward_pass_to_some_leaves_only_is_refused() -> None:
    """`inputs=` would hold gradients back from the probes."""
    model = nn.ModuleDict(two_layers()).double()
    with pc.collect(model, pc.SqNorms()) as record:
        loss = model["b"](model["a"](X)).square().sum()
        with pytest.raises(RuntimeError, match=r"inputs=.*torch\.autograd\.grad"):
            loss.backward(inputs=[model["b"].weight])
        assert model["b"].weight.grad is None
        loss.backward()
    assert record.sq_norms.shape == (5,)


def test_a_backward_pass_after_the_block_raises() -> None:
    """Only inside it can the capture see that no gradient goes past it."""
    model, batch = make("mlp", F64)
    with pc.collect(model, pc.SqNorms()) as record:
        loss = classification("mean")(model, batch)
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\) inside the block"):
        loss.backward()
    for read in (lambda: record.sq_norms, lambda: record.by_parameter, record.coherence):
        with pytest.raises(RuntimeError, match="no backward pass has run"):
            read()


def test_a_second_backward_pass_after_the_block_raises() -> None:
    model = nn.ModuleDict(two_layers()).double()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        first, second = model["a"](X).sum(), model["b"](X[:, :4]).sum()
        first.backward()
    with pytest.raises(RuntimeError, match="inside the block"):
        second.backward()
    assert record.by_parameter["a.bias"].sq_norms.tolist() == [4.0] * 5
    assert record.by_parameter["b.bias"].sq_norms.tolist() == [0.0] * 5


def test_a_kept_graph_can_be_used_again_by_torch_autograd_grad() -> None:
    model = nn.Linear(6, 4).double()
    with pc.collect(model, pc.SqNorms()) as record:
        loss = model(X).square().sum()
        (first,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
        loss.backward(retain_graph=True)
        norms = record.sq_norms
        (third,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"expected one backward pass.*got a second"):
            loss.backward()
    assert relative_error(first, model.weight.grad) == relative_error(third, first) == 0
    assert torch.equal(record.sq_norms, norms)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_second_derivatives_raise(name: str) -> None:
    model, (inputs, labels) = make(name)
    inputs.requires_grad_()
    with pc.collect(model, pc.SqNorms()):
        loss = F.cross_entropy(model(inputs), labels)
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_some_gradients_by_torch_autograd_grad_equal_plain_ones() -> None:
    """They leave no statistics, which are those of all; the record says so."""
    model, batch = make("mlp", F64)
    plain, _ = plain_pass(model, classification("mean"), batch)
    with pc.collect(model, pc.SqNorms()) as record:
        loss = classification("mean")(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters())[1:])
    for ours, parameter in zip(gradients, list(plain.parameters())[1:], strict=True):
        assert relative_error(ours, parameter.grad) < 1e-12
    with pytest.raises(RuntimeError, match=r"no backward pass has run.*backward\(\)"):
        _ = record.sq_norms


def test_a_vector_of_losses_with_weights() -> None:
    """`loss.backward(weights)` weighs each example; its norm has the weight squared."""
    model, weights = nn.Linear(6, 1, bias=False).double(), torch.tensor([0.0, 1, 2, 3, -1]).double()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        model(X).flatten().backward(weights)
    torch.testing.assert_close(record.sq_norms, weights.square() * X.square().sum(1))
