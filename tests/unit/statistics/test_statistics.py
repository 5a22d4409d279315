"""Every statistic of `collect`, alone and with others, against one example at a time."""

import copy
import itertools
from typing import Any

import pytest
import torch
from support.asked import ALL, PER_EXAMPLE, RESULTS, STATISTICS, direction_for
from support.checks import GRADS, assert_grads_equal, plain_pass
from support.models import MODELS, classification, make
from support.oracle import per_example_gradients
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        error = (actual.double() - expected).abs().max().item()
        assert error <= tolerance * expected.abs().max().item(), f"{what}: off by {error:.2g}"


def check(
    names: tuple[str, ...],
    model: nn.Module,
    batch: tuple[Tensor, ...],
    reduction: Any = "mean",
    dtype: torch.dtype = torch.float64,
    group_size: int = 1,
) -> pc.Record:
    """Ask for some statistics and compare all that the record says."""
    direction = direction_for(model)
    truth = per_example_gradients(model, classification(reduction), batch, group_size)
    plain, _ = plain_pass(model, classification(reduction), batch)
    ours = copy.deepcopy(model)
    asked = [STATISTICS[name][0](direction) for name in names]
    with pc.collect(ours, *asked, loss_reduction=reduction, group_size=group_size) as record:
        classification(reduction)(ours, batch).backward()
    assert_grads_equal(ours, plain, GRADS[dtype])
    there, largest = set[str](), max(g.abs().max().item() for g in truth.values())
    for name in names:
        for result, expected in STATISTICS[name][1](truth, direction).items():
            there.add(result)
            assert list(record.by_parameter) == list(expected)
            for parameter, value in expected.items():
                actual = getattr(record.by_parameter[parameter], result)
                if result == "sign_sum":
                    # Some gradients, such as those of attention's key biases, are but rounding.
                    told = (truth[parameter].abs() > 1e-9 * largest).all(0)
                    assert torch.equal(actual[told], value[told]), parameter
                else:
                    close(actual, value, TOLERANCE[dtype], f"{result} of {parameter}")
            if result in PER_EXAMPLE:
                total = torch.stack([*expected.values()]).sum(0)
                close(getattr(record, result), total, TOLERANCE[dtype], f"total {result}")
    for result in RESULTS - there:
        assert not hasattr(record.by_parameter[next(iter(truth))], result)
        assert not hasattr(record, result)
    return record


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", STATISTICS)
def test_each_alone(name: str, model: str, reduction: str) -> None:
    check((name,), *make(model, torch.float64), reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", STATISTICS)
def test_each_of_groups(name: str, model: str, reduction: str) -> None:
    made, batch = make(model, torch.float64)
    check((name,), made, tuple(x[:4] for x in batch), reduction, group_size=2)


@pytest.mark.parametrize("dots", ["mean_dots", "dots"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
def test_all_together(model: str, reduction: str, dots: str) -> None:
    names = tuple(dots if name == "mean_dots" else name for name in ALL)
    record = check(names, *make(model, torch.float64), reduction)
    alone = check(("sq_norms",), *make(model, torch.float64), reduction)
    assert abs(record.coherence().m - alone.coherence().m) < 1e-10


@pytest.mark.parametrize("n", [2, 3, 4])
def test_any_combination(n: int) -> None:
    for names in itertools.combinations(ALL, n):
        check(names, *make("mlp", torch.float64))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_in_float32(model: str) -> None:
    inputs, (images, labels) = make(model)
    check(("sq_norms", "gram", "dots", "moments"), inputs, (images, labels), dtype=torch.float32)


@pytest.mark.parametrize("backend", ["reference", None])
def test_on_either_path(backend: str | None) -> None:
    with pc.backend(backend):
        check(ALL, *make("cnn", torch.float64))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2])
def test_small_batches(size: int, model: str) -> None:
    network, batch = make(model, torch.float64)
    check(ALL, network, tuple(x[:size] for x in batch))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_of_none(reduction: Any, model: str) -> None:
    network, (inputs, labels) = make(model)
    asked = [STATISTICS[name][0](None) for name in ALL]
    with pc.collect(network, *asked, loss_reduction=reduction) as record:
        classification("sum")(network, (inputs[:0], labels[:0])).backward()
    assert (record.sq_norms.shape, record.gram.shape, record.dots.shape) == ((0,), (0, 0), (0,))
    for name, p in network.named_parameters():
        for result in ("first_moment", "second_moment", "sign_sum"):
            value = getattr(record.by_parameter[name], result)
            assert torch.equal(value, torch.zeros_like(p)), (name, result)


def test_frozen_parameters_are_left_out() -> None:
    model, batch = make("mlp", torch.float64)
    model[2].requires_grad_(False)
    record = check(ALL, model, batch)
    assert "2.weight" not in record.by_parameter


def test_parameters_that_took_no_part_have_zeros() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    statistics = (pc.SqNorms(), pc.Gram(), pc.Dots(direction), pc.Moments(), pc.SignSum())
    with pc.collect(model, *statistics) as record:
        model["a"](torch.ones(4, 3)).sum().backward()
    unused = record.by_parameter["b.weight"]
    for result, shape in (("sq_norms", (4,)), ("gram", (4, 4)), ("dots", (4,))):
        assert torch.equal(getattr(unused, result), torch.zeros(shape))
    for result in ("first_moment", "second_moment", "sign_sum"):
        assert torch.equal(getattr(unused, result), torch.zeros(2, 3))
    assert record.gram.shape == (4, 4)


def test_an_example_that_is_not_finite_shows_only_where_it_belongs() -> None:
    model, (inputs, labels) = make("mlp")
    inputs[2, 0] = float("nan")
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with pc.collect(model, pc.Gram(), pc.Dots(direction)) as record:
        classification("mean")(model, (inputs, labels)).backward()
    touched = torch.zeros(5, 5, dtype=torch.bool)
    touched[2], touched[:, 2] = True, True
    assert torch.equal(record.gram.isnan(), touched)
    assert record.dots.isnan().tolist() == [False, False, True, False, False]


def test_what_is_read_belongs_to_the_reader() -> None:
    model, batch = make("mlp")
    asked = [STATISTICS[name][0](None) for name in ALL]
    with pc.collect(model, *asked) as record:
        classification("mean")(model, batch).backward()
    one = record.by_parameter["0.weight"]
    for result in sorted(RESULTS):
        first = getattr(one, result).clone()
        getattr(one, result).fill_(7)
        assert torch.equal(getattr(one, result), first), result
        assert not first.requires_grad
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(7)
    assert not (one.first_moment == 7).any()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_unchanged(name: str) -> None:
    model, batch = make(name)
    asked = [STATISTICS[name][0](None) for name in ALL]
    before = Snapshot(model, grads=False)
    with pc.collect(model, *asked, keep_factors=True) as record:
        classification("mean")(model, batch).backward()
    record.weighted_sum(torch.ones(5))
    before.assert_unchanged(model)


def test_a_direction_may_be_the_gradients_of_another_batch() -> None:
    model, batch = make("mlp", torch.float64)
    classification("mean")(model, batch).backward()
    direction = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with pc.collect(model, pc.Dots(direction)) as record:
        model.zero_grad()
        classification("mean")(model, batch).backward()
    total = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(record.dots.mean(), total)


def test_results_are_bitwise_repeatable() -> None:
    def measure() -> list[Tensor]:
        model, batch = make("transformer")
        with pc.collect(model, *(STATISTICS[name][0](None) for name in ALL)) as record:
            classification("mean")(model, batch).backward()
        found = [getattr(one, r) for one in record.by_parameter.values() for r in sorted(RESULTS)]
        return [record.gram, record.dots, *found]

    assert all(torch.equal(*pair) for pair in zip(measure(), measure(), strict=True))


def test_records_say_what_they_hold() -> None:
    model, batch = make("mlp")
    with pc.collect(model, pc.SqNorms(), pc.Moments()) as record:
        classification("mean")(model, batch).backward()
    shape = tuple(model[0].weight.shape)
    results = "['sq_norms', 'first_moment', 'second_moment']"
    expected = f"ParameterRecord(shape={shape}, results={results})"
    assert repr(record.by_parameter["0.weight"]) == expected
