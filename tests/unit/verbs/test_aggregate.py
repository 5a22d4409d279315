"""The block of `aggregate`: how `.grad` is filled, what is refused, and what is left behind."""

import copy
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import linear, uses
from support.alive import assert_keeps_nothing, assert_leaves_no_garbage
from support.models import MODELS, Batch, classification, make
from support.raising import Expected, fail
from support.settings import threads
from support.snapshots import Snapshot
from support.steps import aggregated, larger
from torch import Tensor, nn

import pycoherence as pc

RULES: dict[str, Callable[[], Any]] = {
    "coordinates": lambda: pc.Winsorized(1),
    "signs": lambda: pc.SignAgreement(0.5),
    "examples": lambda: pc.Krum(1),
    "both": lambda: pc.Bulyan(0),
    "carried": lambda: pc.CenteredClip(0.3),
    "clipped": lambda: pc.NormClip(0.3),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
both_kinds = pytest.mark.parametrize("rule", [RULES["coordinates"], RULES["examples"]])


@every_rule
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_unchanged_inside_and_after_a_block(name: str, rule: Any) -> None:
    model, batch = make(name)
    before = Snapshot(model, grads=False)
    with pc.aggregate(model, rule()) as agg:
        inside = Snapshot(model, grads=False)
        assert (inside.modules, inside.tensors) == (before.modules, before.tensors)
        classification("mean")(model, batch).backward()
    _ = agg.report
    before.assert_unchanged(model)


@every_rule
def test_it_is_added_to_what_is_there(rule: Any) -> None:
    model, batch = larger("cnn")
    found, _ = aggregated(model, batch, rule())
    for p in model.parameters():
        p.grad.fill_(2)
    same = [p.grad for p in model.parameters()]
    with pc.aggregate(model, rule()):
        classification("mean")(model, batch).backward()
    for (name, p), grad in zip(model.named_parameters(), same, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, found[name] + 2)


@every_rule
def test_it_has_the_layout_and_the_dtype_of_the_parameter(rule: Any) -> None:
    model, (inputs, labels) = larger("cnn", torch.float32)
    model = model.to(memory_format=torch.channels_last).bfloat16()
    found, _ = aggregated(model, (inputs.bfloat16(), labels), rule())
    assert all(g.dtype == torch.bfloat16 for g in found.values())
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


@every_rule
def test_frozen_parameters_and_those_without_a_part(rule: Any) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model["a"].bias.requires_grad_(False)
    with pc.aggregate(model, rule()) as agg:
        model["a"](torch.randn(5, 3)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["a.weight"]
    assert list(agg.report.by_parameter) == ["a.weight"]


@every_rule
def test_an_empty_batch(rule: Any) -> None:
    model = nn.Linear(3, 2)
    with pc.aggregate(model, rule(), loss_reduction="sum") as agg:
        model(torch.ones(0, 3)).sum().backward()
    assert model.weight.grad.count_nonzero() == 0
    assert agg.report.batch_size == 0


@both_kinds
def test_the_gradient_of_the_input_is_the_ordinary_one(rule: Any) -> None:
    model, (inputs, labels) = larger("cnn")
    grads = []
    for aggregate in (False, True):
        x = inputs.clone().requires_grad_()
        if aggregate:
            with pc.aggregate(model, rule()):
                F.cross_entropy(model(x), labels).backward()
        else:
            F.cross_entropy(model(x), labels).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@both_kinds
def test_a_tensor_that_is_no_parameter_gets_its_ordinary_gradient(rule: Any) -> None:
    shift = torch.zeros(2, requires_grad=True)
    model = uses(lambda m, x: F.linear(x, m.layer.weight, shift), layer=linear(3, 2))()
    with pc.aggregate(model, rule()):
        model(torch.randn(5, 3)).sum(1).mean().backward()
    torch.testing.assert_close(shift.grad, torch.ones(2))


def descend(
    model: nn.Module, batch: Batch, optimizer: Any, step: Callable[..., None]
) -> list[float]:
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        step(model, batch, optimizer)
        losses.append(classification("mean")(model, batch).item())
    return losses


def inside(rule: Any) -> Callable[..., None]:
    def step(model: nn.Module, batch: Batch, optimizer: Any) -> None:
        with pc.aggregate(model, rule):
            classification("mean")(model, batch).backward()
            optimizer.step()

    return step


def after(rule: Any) -> Callable[..., None]:
    def step(model: nn.Module, batch: Batch, optimizer: Any) -> None:
        with pc.aggregate(model, rule):
            classification("mean")(model, batch).backward()
        optimizer.step()

    return step


def plain(model: nn.Module, batch: Batch, optimizer: Any) -> None:
    classification("mean")(model, batch).backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@every_rule
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_steps_inside_or_after_the_block(optimizer: Any, rule: Any) -> None:
    model, batch = larger("mlp")
    other = copy.deepcopy(model)
    first = descend(model, batch, optimizer(model.parameters()), inside(rule()))
    second = descend(other, batch, optimizer(other.parameters()), after(rule()))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rule", [pc.TrimmedMean(0), pc.NormClip(1e6)], ids=str)
def test_training_with_the_mean_is_training(optimizer: Any, rule: Any) -> None:
    model, batch = larger("cnn")
    other = copy.deepcopy(model)
    descend(model, batch, optimizer(model.parameters()), after(rule))
    descend(other, batch, optimizer(other.parameters()), plain)
    torch.testing.assert_close([*model.parameters()], [*other.parameters()], rtol=1e-8, atol=1e-9)


@every_rule
def test_the_same_for_any_number_of_threads_and_each_time(rule: Any) -> None:
    results = []
    for n in (1, 2, 2):
        with threads(n):
            results.append(aggregated(*larger("transformer", torch.float32), rule())[0])
    for other in results[1:]:
        assert all(torch.equal(g, other[n]) for n, g in results[0].items())


def test_its_name() -> None:
    assert repr(pc.aggregate(nn.Linear(2, 1), pc.Median(), nonfinite="drop", group_size=2)) == (
        "aggregate(Median(lower=False), loss_reduction='mean', nonfinite='drop', group_size=2)"
    )


def test_a_rule_is_needed() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"got a class; write pc\.Krum\(\.\.\.\)"):
        pc.aggregate(model, pc.Krum)
    with pytest.raises(
        TypeError, match=r"expected a rule such as pc\.Winsorized\(2\), got 'median'"
    ):
        pc.aggregate(model, "median")
    with pytest.raises(ValueError, match="loss_reduction to be 'mean' or 'sum', got 'none'"):
        pc.aggregate(model, pc.Median(), loss_reduction="none")
    with pytest.raises(ValueError, match="nonfinite to be 'nan' or 'drop', got 'zero'"):
        pc.aggregate(model, pc.Median(), nonfinite="zero")
    with pytest.raises(ValueError, match="parameters that require a gradient"):
        pc.aggregate(nn.ReLU(), pc.Median())
    with pytest.raises(pc.UnsupportedError, match="BatchNorm1d"):
        pc.aggregate(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), pc.Median()).__enter__()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            pc.Winsorized(3),
            r"Winsorized\(k=3\) clips k = 3 .* needs 7 examples, got 5; take larger",
        ),
        (pc.TrimmedMean(3), "needs 7 examples, got 5"),
        (pc.Phocas(3), "needs 7 examples, got 5"),
        (pc.MeaMed(5), "leaves out k = 5 values, for which a batch needs more examples, got 5"),
        (pc.MedianOfMeans(6), "makes 6 groups, for which a batch needs as many examples, got 5"),
        (pc.Krum(2), r"2f \+ 3 = 7 examples or more, .*got 5"),
        (pc.Krum(0, 6), "averages the m = 6 best, .* needs as many examples, got 5"),
        (pc.Bulyan(1), r"4f \+ 3 = 7 examples or more, got 5"),
    ],
)
def test_a_batch_that_is_too_small(rule: Any, message: str) -> None:
    model, batch = make("mlp")
    agg = pc.aggregate(model, rule)
    with pytest.raises(ValueError, match=message), agg:
        classification("mean")(model, batch).backward()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no backward pass has run to its end"):
        _ = agg.report


@both_kinds
def test_reports_before_a_backward_pass(rule: Any) -> None:
    model, batch = make("mlp")
    agg = pc.aggregate(model, rule())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no backward pass.*loss\.backward\(\) in it first"):
            _ = agg.report
        if agg._capture is None:
            with pytest.raises(RuntimeError, match="no backward pass of this model was seen"), agg:
                classification("mean")(model, batch)


@both_kinds
def test_a_block_in_which_nothing_was_aggregated(rule: Any) -> None:
    model, batch = make("mlp")
    other = nn.Linear(2, 1)

    def of_another_model() -> None:
        other(torch.ones(3, 2)).sum().backward()

    def in_another_thread() -> None:
        loss = classification("mean")(model, batch)
        with futures.ThreadPoolExecutor(1) as pool:
            error = pool.submit(loss.backward).exception()
        assert isinstance(error, RuntimeError)

    for act in (lambda: None, of_another_model, in_another_thread):
        with (
            pytest.raises(RuntimeError, match="so that nothing was aggregated; run the forward"),
            pc.aggregate(model, rule()),
        ):
            act()
    with pytest.raises(ZeroDivisionError), pc.aggregate(model, rule()):
        _ = 1 / 0
    aggregated(model, batch, rule())


@both_kinds
def test_one_block_and_one_pass(rule: Any) -> None:
    model, batch = make("mlp")
    agg = pc.aggregate(model, rule())
    with agg:
        loss = classification("mean")(model, batch)
        with pytest.raises(RuntimeError, match="blocks of collect and aggregate cannot be nested"):
            pc.aggregate(model, rule()).__enter__()
        loss.backward(retain_graph=True)
        grads = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="expected one backward pass over a forward pass"):
            loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    with pytest.raises(RuntimeError, match="this aggregate has been used"):
        agg.__enter__()


def test_backward_passes_over_parts_of_the_model() -> None:
    """Each coordinate has its own values; whole examples have to come at once."""
    x = torch.randn(5, 3)
    for rule, allowed in ((pc.Median(), True), (pc.Krum(1), False)):
        model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        with pc.aggregate(model, rule) as agg:
            model["a"](x).square().mean().backward()
            second = model["b"](x).square().mean()
            if allowed:
                second.backward()
                assert len(agg.report.by_parameter) == 4
            else:
                with pytest.raises(RuntimeError, match="made of all layers together, got a second"):
                    second.backward()


def test_backward_passes_of_other_models_are_left_alone() -> None:
    model, batch = larger("mlp")
    expected, _ = aggregated(model, batch, pc.Krum(1))
    other = nn.Linear(2, 1)
    model.zero_grad()
    with pc.aggregate(model, pc.Krum(1)):
        other(torch.ones(3, 2)).sum().backward()
        loss = classification("mean")(model, batch)
        other(torch.ones(3, 2)).sum().backward()
        loss.backward()
        other(torch.ones(3, 2)).sum().backward()
    assert other.weight.grad.tolist() == [[9, 9]]
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())


def test_autograd_grad() -> None:
    model, batch = larger("mlp")
    expected, _ = aggregated(model, batch, pc.Median())
    x = batch[0].clone().requires_grad_()
    for rule, allowed in ((pc.Median(), True), (pc.Krum(1), False)):
        with pc.aggregate(model, rule):
            loss = classification("mean")(model, (x, batch[1]))
            assert torch.autograd.grad(loss, x, retain_graph=True)[0].shape == x.shape
            if allowed:
                found = torch.autograd.grad(loss, list(model.parameters()))
                assert all(map(torch.equal, found, expected.values()))
            else:
                with pytest.raises(RuntimeError, match=r"cannot give the gradients of 0\.weight"):
                    torch.autograd.grad(loss, model[0].weight)


def test_autograd_grad_of_a_batch_that_is_too_small() -> None:
    model, batch = make("mlp")
    with (
        pytest.raises(ValueError, match=r"Winsorized\(k=3\) clips .* got 5; take larger"),
        pc.aggregate(model, pc.Winsorized(3)),
    ):
        torch.autograd.grad(classification("mean")(model, batch), list(model.parameters()))


def test_hooks_on_gradients() -> None:
    seen: list[Tensor] = []
    for register in (
        lambda p: p.register_hook(seen.append),
        lambda p: p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad)),
    ):
        model, batch = larger("mlp")
        handle = register(model[0].weight)
        found, _ = aggregated(model, batch, pc.Median())
        assert torch.equal(seen.pop(), found["0.weight"])
        with (
            pytest.raises(pc.UnsupportedError, match=r"0\.weight: the parameter has hooks"),
            pc.aggregate(model, pc.Krum(1)),
        ):
            classification("mean")(model, batch).backward()
        handle.remove()
        aggregated(model, batch, pc.Krum(1))
    assert not seen


def test_an_activation_changed_in_place() -> None:
    model, (inputs, labels) = larger("mlp")
    inputs.requires_grad_()

    def spoil(grad: Tensor) -> None:
        inputs.data.zero_()
        torch.autograd.graph.increment_version(inputs)

    inputs.register_hook(spoil)
    with (
        pytest.raises(RuntimeError, match=r"changed in place.*0\.weight are lost; leave what"),
        pc.aggregate(model, pc.Krum(1)),
    ):
        F.cross_entropy(model(inputs), labels).backward()
    assert all(p.grad is None for p in model.parameters())


@every_rule
@pytest.mark.parametrize("where", ["before", "between", "in-backward"])
def test_an_exception_anywhere_leaves_no_trace(where: str, rule: Any) -> None:
    model, (inputs, labels) = make("mlp")
    inputs.requires_grad_()
    one, before = rule(), Snapshot(model)

    def run() -> None:
        if where == "before":
            fail()
        out = model(inputs)
        if where == "between":
            fail()
        out.register_hook(fail)  # before any layer has its gradient
        F.cross_entropy(out, labels).backward()

    with pytest.raises(Expected), pc.aggregate(model, one) as agg:
        run()
    before.assert_unchanged(model)
    with pytest.raises(RuntimeError, match="no backward pass has run to its end"):
        _ = agg.report
    aggregated(model, (inputs, labels), one)


@every_rule
def test_an_exception_at_the_end_of_the_backward_pass(rule: Any) -> None:
    model, (inputs, labels) = make("mlp")
    inputs.requires_grad_()
    handle = inputs.register_hook(fail)
    one, before = rule(), Snapshot(model, grads=False)
    with pytest.raises(Expected), pc.aggregate(model, one) as agg:
        F.cross_entropy(model(inputs), labels).backward()
    before.assert_unchanged(model)
    if isinstance(one, pc.CenteredClip):
        assert one.centre.value == {}
    if not isinstance(one, pc.Winsorized | pc.SignAgreement):  # as in a plain pass
        assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no backward pass has run to its end"):
        _ = agg.report
    handle.remove()
    aggregated(model, (inputs, labels), one)


@every_rule
def test_steps_keep_nothing_alive(rule: Any) -> None:
    """Nor does anything wait for the garbage collector."""
    model, batch = make("mlp")
    one = rule()

    def step() -> None:
        with pc.aggregate(model, one) as agg:
            classification("mean")(model, batch).backward()
        _ = agg.report

    assert_keeps_nothing(step, 20)
    assert_leaves_no_garbage(step)


def test_factors_are_freed_with_the_pass() -> None:
    model, batch = make("mlp")
    with pc.aggregate(model, pc.Krum(1)) as agg:
        classification("mean")(model, batch).backward()
        assert agg._capture.results.factors == {}
