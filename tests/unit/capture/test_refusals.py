"""What cannot be measured is refused, in words that help, and leaves no trace."""

import copy
import re

import pytest
import torch
from catalogue.refusals import REFUSALS, Refusal
from support.checks import assert_grads_equal
from support.models import MLP, classification, make
from support.snapshots import Snapshot
from torch import nn

import pycoherence as pc


def attempt(model: nn.Module, case: Refusal) -> None:
    x = case.inputs()
    with pc.collect(model, pc.SqNorms()):
        model(x).square().mean().backward()


def with_stale_gradients(model: nn.Module) -> nn.Module:
    """As between two steps of gradient accumulation; a refusal must not touch them."""
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
    return model


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_the_message_says_where_what_and_the_way_out(case: Refusal) -> None:
    with pytest.raises(pc.UnsupportedError) as refusal:
        attempt(case.build(), case)
    message = str(refusal.value)
    missing = [pattern for pattern in case.says if not re.search(pattern, message)]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_nothing_is_left_behind(case: Refusal) -> None:
    model = with_stale_gradients(case.build())
    before = Snapshot(model)
    with pytest.raises(pc.UnsupportedError):
        attempt(model, case)
    before.assert_unchanged(model)


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_plain_training_works_afterwards(case: Refusal) -> None:
    model = case.build()
    plain = copy.deepcopy(model)
    with pytest.raises(pc.UnsupportedError):
        attempt(model, case)
    x = case.inputs()
    for net in (plain, model):
        if any(isinstance(m, nn.Embedding) and m.sparse for m in net.modules()):
            pytest.skip("sparse gradients are compared elsewhere")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(x).square().mean().backward()
        optimizer.step()
    assert_grads_equal(model, plain, 0)
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda m: sum(p.square().sum() for p in m.parameters()),
        lambda m: m[0].weight.norm(),
        lambda m: torch.cat([p.flatten() for p in m.parameters()]).norm(),
        lambda m: nn.utils.parameters_to_vector(m.parameters()).abs().sum(),
        lambda m: nn.functional.mse_loss(m[0].bias, torch.zeros(13)),
    ],
    ids=["squares", "norm", "cat", "vector", "mse"],
)
def test_a_parameter_in_the_loss_is_refused(penalty) -> None:
    model, batch = make("mlp")
    message = r"parameter '(weight|bias)' of module '0'.*, used.*weight_decay"
    with (
        pytest.raises(pc.UnsupportedError, match=message),
        pc.collect(model, pc.SqNorms()),
    ):
        (classification("mean")(model, batch) + penalty(model)).backward()


def test_a_penalty_without_gradient_is_fine() -> None:
    """As for a print-out, in any of the ways to leave the gradient out."""
    model, batch = make("mlp")
    with pc.collect(model, pc.SqNorms()) as record:
        with torch.no_grad():
            size = sum(p.square().sum() for p in model.parameters())
        size = size + model[0].weight.detach().square().sum() + model[0].weight.data.sum()
        classification("mean")(model, batch).backward()
    assert size.grad_fn is None
    assert record.sq_norms.isfinite().all()


def test_a_training_loop_in_a_block_is_refused() -> None:
    model, batch = make("mlp")
    message = r"'weight' of module '0'.*: expected one forward.*got a second.*inside the loop"
    with pc.collect(model, pc.SqNorms()):
        model(batch[0]).sum().backward()
        with pytest.raises(pc.UnsupportedError, match=message):
            model(batch[0])


def test_what_is_frozen_may_do_as_it_likes() -> None:
    """The same layers as above, with their parameters frozen as the messages advise."""
    for name in ("parameter-as-input", "max-norm"):
        case = REFUSALS[name]
        model = case.build().requires_grad_(False)
        head = nn.Linear(model(case.inputs()).shape[-1], 3)
        with pc.collect(head, pc.SqNorms()) as record:
            head(model(case.inputs())).square().mean().backward()
        assert record.sq_norms.isfinite().all(), name


def test_batch_norm_is_refused_before_it_counts_the_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    with pytest.raises(pc.UnsupportedError, match="BatchNorm1d"):
        pc.collect(model, pc.SqNorms()).__enter__()
    assert model[1].num_batches_tracked == 0
    assert torch._C._len_torch_function_stack() == 0


def test_batch_norm_may_train_again_after_the_block() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].eval()
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.randn(4, 6)).square().mean().backward()
    assert record.sq_norms.isfinite().all()
    model.train()(torch.randn(4, 6)).sum().backward()
    assert model[1].num_batches_tracked == 1


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(
        TypeError, match=r"real floating parameters, got torch.complex64 in 'weight'"
    ):
        pc.collect(model, pc.SqNorms())


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters that require a gradient, got MLP without any"):
        pc.collect(MLP().requires_grad_(False), pc.SqNorms())
