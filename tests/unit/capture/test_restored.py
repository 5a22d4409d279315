"""A block leaves the model as it was, however it ends, and keeps nothing alive."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.alive import assert_keeps_nothing, assert_leaves_no_garbage, live_tensors
from support.models import MODELS, classification, make
from support.raising import Expected, fail
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_unchanged_inside_and_after_a_block(name: str) -> None:
    model, batch = make(name)
    before = Snapshot(model, grads=False)
    with pc.collect(model, pc.SqNorms()) as record:
        inside = Snapshot(model, grads=False)
        assert (inside.modules, inside.tensors) == (before.modules, before.tensors)
        classification("mean")(model, batch).backward()
    _ = record.sq_norms, record.coherence()
    before.assert_unchanged(model)


def before_forward(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    raise Expected


def between(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    classification("mean")(model, batch)
    raise Expected


def in_forward(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    handle = model[2].register_forward_hook(fail)
    try:
        model(batch[0])
    finally:
        handle.remove()


def in_backward(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    loss, hidden = classification("mean")(model, batch), model[0].weight.new_ones(1)
    hidden.requires_grad_().register_hook(fail)
    (loss.detach() + hidden.sum()).backward()


def bad_input(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    try:
        model(batch[0][:, :3])
    except RuntimeError as error:
        raise Expected from error


PLACES: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], None]] = {
    "before-forward": before_forward,
    "in-forward": in_forward,
    "between": between,
    "in-backward": in_backward,
    "bad-input": bad_input,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_an_exception_anywhere_leaves_no_trace(
    place: Callable[[nn.Module, tuple[Tensor, ...]], None],
) -> None:
    model, batch = make("mlp")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = Snapshot(model)
    with pytest.raises(Expected), pc.collect(model, pc.SqNorms()):
        place(model, batch)
    before.assert_unchanged(model)
    with pc.collect(model, pc.SqNorms()) as record:
        classification("mean")(model, batch).backward()
    assert record.sq_norms.isfinite().all()


def test_blocks_cannot_be_nested_and_the_outer_goes_on() -> None:
    model, batch = make("mlp")
    with pc.collect(model, pc.SqNorms()) as record:
        with pytest.raises(RuntimeError, match=r"cannot be nested.*one collect block"):
            pc.collect(model, pc.SqNorms()).__enter__()
        with pytest.raises(RuntimeError, match=r"cannot be nested.*meters outside both"):
            pc.CoherenceMeter(model).update(classification("mean"), batch)
        classification("mean")(model, batch).backward()
    assert record.sq_norms.isfinite().all()
    assert torch._C._len_torch_function_stack() == 0


def test_a_collect_serves_one_block() -> None:
    model, batch = make("mlp")
    once = pc.collect(model, pc.SqNorms())
    with once:
        classification("mean")(model, batch).backward()
    with pytest.raises(RuntimeError, match="has been used; make a new one"):
        once.__enter__()
    assert torch._C._len_torch_function_stack() == 0


def test_training_with_measurement_equals_training_without() -> None:
    plain, batch = make("cnn", torch.float64)
    measured = copy.deepcopy(plain)
    for model in (plain, measured):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            if model is measured:
                with pc.collect(model, pc.SqNorms()):
                    classification("mean")(model, batch).backward()
            else:
                classification("mean")(model, batch).backward()
            optimizer.step()
    torch.testing.assert_close(
        [*measured.parameters()], [*plain.parameters()], rtol=1e-9, atol=1e-11
    )


def read(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    with pc.collect(model, pc.SqNorms()) as record:
        classification("mean")(model, batch).backward()
    _ = record.sq_norms, record.by_parameter, record.coherence()


def everything(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    statistics = (pc.SqNorms(), pc.Gram(), pc.Dots("mean"), pc.Moments(), pc.SignSum())
    with pc.collect(model, *statistics, keep_factors=True) as record:
        classification("mean")(model, batch).backward()
    _ = record.gram, record.dots, record.by_parameter["0.weight"].second_moment


def clipped(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    pc.weighted_sum(model, classification("mean"), batch, lambda record: record.sq_norms)


def never_backward(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    with pc.collect(model, pc.SqNorms()):
        classification("mean")(model, batch)


def refused(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    with pytest.raises(pc.UnsupportedError), pc.collect(model, pc.SqNorms()):
        (classification("mean")(model, batch) + next(model.parameters()).sum()).backward()


def interrupted(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    with pytest.raises(Expected), pc.collect(model, pc.SqNorms()):
        between(model, batch)


def metered(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    meter = pc.CoherenceMeter(model)
    meter.update(classification("mean"), batch)
    meter.compute()


def verified(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    pc.verify(model, classification("mean"), batch)


@pytest.mark.parametrize(
    "step",
    [read, everything, clipped, never_backward, refused, interrupted, metered],
    ids=lambda f: f.__name__,
)
def test_fifty_steps_keep_nothing_alive(
    step: Callable[[nn.Module, tuple[Tensor, ...]], None],
) -> None:
    model, batch = make("mlp")
    assert_keeps_nothing(lambda: step(model, batch), 50)


def test_verify_keeps_nothing_alive() -> None:
    model, batch = make("mlp")
    assert_keeps_nothing(lambda: verified(model, batch), 5)


@pytest.mark.parametrize("step", [read, everything, clipped], ids=lambda f: f.__name__)
def test_nothing_waits_for_the_garbage_collector(step: Callable[..., None]) -> None:
    model, batch = make("mlp")
    assert_leaves_no_garbage(lambda: step(model, batch))


def test_a_record_does_not_keep_the_activations() -> None:
    model, batch = make("mlp")
    with pc.collect(model, pc.SqNorms()):
        classification("mean")(model, batch).backward()
    before = live_tensors()
    records = []
    for _ in range(10):
        with pc.collect(model, pc.SqNorms()) as record:
            classification("mean")(model, batch).backward()
        records.append(record)
    # A probe for each of six parameters, its gradient, and norms of the sum.
    assert live_tensors() - before <= 10 * 6 * 3
