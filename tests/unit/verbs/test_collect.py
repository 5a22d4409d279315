"""What `collect` takes and what its record says."""

import math

import pytest
import torch
from support.models import MODELS, classification, make
from support.oracle import per_example_gradients
from support.settings import threads
from torch import nn

import pycoherence as pc


def recorded(name: str = "mlp", reduction: str = "mean") -> tuple[nn.Module, pc.Record]:
    model, batch = make(name, torch.float64)
    with pc.collect(model, pc.SqNorms(), loss_reduction=reduction) as record:
        classification(reduction)(model, batch).backward()
    return model, record


def test_statistics_are_needed() -> None:
    with pytest.raises(
        ValueError, match=r"one or more statistics such as pc.SqNorms\(\), got none"
    ):
        pc.collect(nn.Linear(2, 1))


def test_a_class_instead_of_an_object_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got a class; write SqNorms\(\)"):
        pc.collect(nn.Linear(2, 1), pc.SqNorms)


@pytest.mark.parametrize("reduction", ["none", "Mean", "", None])
def test_unknown_loss_reductions_are_refused(reduction) -> None:
    message = f"expected loss_reduction to be 'mean' or 'sum', got {reduction!r}"
    for make_it in (
        lambda: pc.collect(nn.Linear(2, 1), pc.SqNorms(), loss_reduction=reduction),
        lambda: pc.CoherenceMeter(nn.Linear(2, 1), loss_reduction=reduction),
        lambda: pc.verify(nn.Linear(2, 1), None, None, loss_reduction=reduction),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


def test_a_statistic_is_asked_for_once() -> None:
    with pytest.raises(ValueError, match="each statistic once, got 2 of SqNorms"):
        pc.collect(nn.Linear(2, 1), pc.SqNorms(), pc.Gram(), pc.SqNorms())


def test_reading_before_the_forward_pass_raises() -> None:
    with pc.collect(nn.Linear(2, 1), pc.SqNorms()) as record:
        for read in (
            lambda: record.batch_size,
            lambda: record.sq_norms,
            lambda: record.by_parameter,
            record.coherence,
        ):
            with pytest.raises(
                RuntimeError, match=r"no parameter of the model was used.*model\(x\)"
            ):
                read()


def test_reading_before_the_backward_pass_raises() -> None:
    model = nn.Linear(2, 1)
    with pc.collect(model, pc.SqNorms()) as record:
        loss = model(torch.ones(3, 2)).sum()
        assert record.batch_size == 3
        for read in (lambda: record.sq_norms, lambda: record.by_parameter, record.coherence):
            with pytest.raises(RuntimeError, match=r"no backward pass has run.*3.*loss\.backward"):
                read()
        loss.backward()
        inside = record.sq_norms
    assert torch.equal(record.sq_norms, inside)


def test_reading_without_gradients_enabled_raises() -> None:
    model = nn.Linear(2, 1)
    with pc.collect(model, pc.SqNorms()) as record, torch.no_grad():
        model(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="with gradients enabled"):
        _ = record.sq_norms


def test_what_is_read_belongs_to_the_reader() -> None:
    """Changing it must not change the record."""
    _, record = recorded()
    first = record.sq_norms.clone()
    record.sq_norms.zero_()
    record.by_parameter["0.weight"].sq_norms.zero_()
    assert torch.equal(record.sq_norms, first)


def test_record_can_be_read_after_further_training() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    with pc.collect(model, pc.SqNorms()) as record:
        model["a"](torch.ones(2, 3)).sum().backward()
    before = record.sq_norms
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (model["a"](torch.ones(2, 3)) + model["b"](torch.ones(2, 3))).sum().backward()
        optimizer.step()
    assert torch.equal(record.sq_norms, before)
    assert record.by_parameter["b.weight"].sq_norms.tolist() == [0, 0]


def test_results_carry_no_graph() -> None:
    _, record = recorded()
    assert not record.sq_norms.requires_grad
    assert not any(one.sq_norms.requires_grad for one in record.by_parameter.values())


@pytest.mark.parametrize("name", MODELS)
def test_mean_and_sum_describe_the_same_examples(name: str) -> None:
    """A transformer's mean is over positions as well, and all its examples have nine."""
    _, mean = recorded(name, "mean")
    _, total = recorded(name, "sum")
    scale = 81 if name == "transformer" else 1
    torch.testing.assert_close(mean.sq_norms * scale, total.sq_norms)
    assert math.isclose(mean.coherence().m, total.coherence().m, rel_tol=1e-9)


def test_the_mean_of_the_examples_is_the_gradient() -> None:
    model, record = recorded("cnn")
    coherence = record.coherence()
    total = sum(p.grad.square().sum().item() for p in model.parameters()) * 5**2
    assert math.isclose(coherence.sum_sq_norm, total, rel_tol=1e-12)
    assert math.isclose(coherence.total_sq_norm, record.sq_norms.sum().item(), rel_tol=1e-12)
    assert coherence.n == record.batch_size == 5


@pytest.mark.parametrize("name", MODELS)
def test_coherence_by_parameter_and_by_module_adds_up(name: str) -> None:
    model, record = recorded(name)
    whole = record.coherence()
    paths = {path for path, _ in model.named_modules() if path}
    owners = {path for path in paths if any(True for _ in model.get_submodule(path).parameters())}
    assert set(whole.by_module) == owners
    assert list(whole.by_parameter) == [n for n, _ in model.named_parameters()]
    for field in ("sum_sq_norm", "total_sq_norm"):
        total = getattr(whole, field)
        parts = [getattr(p, field) for p in whole.by_parameter.values()]
        assert math.isclose(sum(parts), total, rel_tol=1e-12)
        for path, module in whole.by_module.items():
            below = [
                getattr(p, field) for n, p in whole.by_parameter.items() if n.startswith(f"{path}.")
            ]
            assert math.isclose(getattr(module, field), sum(below), rel_tol=1e-12), path
        top = [getattr(p, field) for path, p in whole.by_module.items() if "." not in path]
        assert math.isclose(sum(top), total, rel_tol=1e-12)
    parts = list(whole.by_parameter.values())
    shares = torch.tensor([part.total_sq_norm for part in parts])
    ms = torch.tensor([part.m for part in parts])
    combined = pc.metrics.combine(ms[shares > 0], shares[shares > 0])
    torch.testing.assert_close(float(combined), whole.m, rtol=1e-5, atol=0)


def test_modules_with_similar_names_are_not_mixed_up() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "ab": nn.Linear(2, 1, bias=False)})
    with pc.collect(model, pc.SqNorms()) as record:
        (model["a"](torch.ones(3, 2)) + model["ab"](torch.ones(3, 2))).sum().backward()
    by_module = record.coherence().by_module
    assert {path: part.total_sq_norm for path, part in by_module.items()} == {"a": 81, "ab": 54}


def test_parameters_of_the_model_itself_belong_to_no_module() -> None:
    model = nn.Linear(2, 1)
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.ones(3, 2)).sum().backward()
    assert record.coherence().by_module == {}
    assert set(record.coherence().by_parameter) == {"weight", "bias"}


def test_coherence_of_nothing_is_not_a_number() -> None:
    model = nn.Linear(2, 1)
    with pc.collect(model, pc.SqNorms()) as record:
        (model(torch.ones(3, 2)) * 0).sum().backward()
    coherence = record.coherence()
    assert math.isnan(coherence.m)
    assert math.isnan(coherence.alpha)


def test_coherence_of_equal_examples_is_their_number() -> None:
    model = nn.Linear(2, 3)
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.ones(4, 2)).square().mean().backward()
    c = record.coherence()
    assert math.isclose(c.m, 4, rel_tol=1e-6)
    assert math.isclose(c.alpha, 1, rel_tol=1e-6)
    assert math.isclose(c.unbiased_alpha, 1, rel_tol=1e-6)


def test_coherence_of_one_example() -> None:
    model = nn.Linear(2, 3)
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.ones(1, 2)).square().mean().backward()
    assert math.isclose(record.coherence().m, 1, rel_tol=1e-6)
    assert math.isnan(record.coherence().unbiased_alpha)


def test_an_example_that_is_not_finite_shows_in_its_own_norm_only() -> None:
    model, (inputs, labels) = make("mlp")
    inputs[2, 0] = float("nan")
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        classification("sum")(model, (inputs, labels)).backward()
    assert record.sq_norms.isnan().tolist() == [False, False, True, False, False]
    assert math.isnan(record.coherence().m)
    others = [0, 1, 3, 4]
    gradients = per_example_gradients(
        model, classification("sum"), (inputs[others], labels[others])
    )
    total = sum(g.flatten(1).square().sum(1) for g in gradients.values())
    torch.testing.assert_close(record.sq_norms[others].double(), total, rtol=1e-5, atol=0)


def test_a_norm_beyond_float32_is_infinite_not_wrong() -> None:
    model = nn.Linear(1, 1, bias=False)
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        (model(torch.tensor([[1e25], [1.0]])) * 1.0).sum().backward()
    assert record.sq_norms.tolist() == [float("inf"), 1.0]


def test_results_are_bitwise_repeatable() -> None:
    first, second = (recorded("transformer")[1] for _ in range(2))
    assert torch.equal(first.sq_norms, second.sq_norms)
    assert first.coherence() == second.coherence()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for n in (1, 2):
        with threads(n):
            found.append(recorded("mlp")[1].sq_norms)
    assert torch.equal(*found)
