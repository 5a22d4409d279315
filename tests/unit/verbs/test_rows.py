"""Each row of docs/models.md holds."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from catalogue.row import B, Row
from catalogue.rows import all_rows
from support.checks import assert_gram, assert_norms, assert_sums, grad_of
from support.oracle import per_example_gradients
from support.snapshots import Snapshot
from table import PAGE, page
from torch import Tensor

import pycoherence as pc

ROWS = {f"{row.topic}: {row.name}": row for row in all_rows()}
MEASURED = {name: row for name, row in ROWS.items() if row.outcome != "refused"}
REFUSED = {name: row for name, row in ROWS.items() if row.outcome != "exact"}
TOLERANCE = 1e-9


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = expected.abs().max().clamp_min(1e-30)
    error = (actual.double() - expected).abs().max() / scale
    assert error <= TOLERANCE, f"{what}: off by {error:.2g}"


@pytest.mark.parametrize("row", MEASURED.values(), ids=MEASURED)
def test_exact(row: Row) -> None:
    model, batch = row.in_float64()
    truth = per_example_gradients(model, row.loss, batch)
    coef = torch.linspace(-1, 2, B, dtype=torch.float64)
    with (
        (row.context or nullcontext)(),
        pc.collect(model, pc.Gram(), pc.SqNorms(), keep_factors=True) as record,
    ):
        row.loss(model, batch).backward()
    assert not record.skipped
    assert bool(record.fallbacks) == (row.outcome == "fallback")
    assert_norms(record, truth, TOLERANCE)
    assert_gram(record, truth, TOLERANCE)
    for name, g in truth.items():
        assert_near(grad_of(model.get_parameter(name)), g.mean(0), f"{name}: grad")
    assert_sums(record.weighted_sum(coef), truth, coef, TOLERANCE)


@pytest.mark.parametrize("row", MEASURED.values(), ids=MEASURED)
def test_aggregates(row: Row) -> None:
    model, batch = row.in_float64()
    truth = per_example_gradients(model, row.loss, batch)
    with (row.context or nullcontext)(), pc.aggregate(model, pc.Winsorized(1)):
        row.loss(model, batch).backward()
    for name, g in truth.items():
        ordered = g.sort(0).values
        expected = ordered.clamp(ordered[1], ordered[-2]).mean(0)
        assert_near(grad_of(model.get_parameter(name)), expected, name)


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_left_behind(row: Row) -> None:
    model, batch = row.in_float64()
    before = Snapshot(model)
    with (
        (row.context or nullcontext)(),
        pytest.raises(pc.UnsupportedError) as refusal,
        pc.collect(model, pc.SqNorms(), on_unsupported="raise"),
    ):
        row.loss(model, batch).backward()
    message = str(refusal.value)
    assert "What to do: " in message
    assert row.outcome == "fallback" or (row.says and re.search(row.says, message)), message
    before.assert_unchanged(model)


@pytest.mark.parametrize("row", MEASURED.values(), ids=MEASURED)
def test_training_goes_on_afterwards(row: Row) -> None:
    """Nothing of the pass stays on the model: it can be copied, and trained as ever."""
    model, batch = row.in_float64()
    with (row.context or nullcontext)(), pc.collect(model, pc.SqNorms()):
        row.loss(model, batch).backward()
    model.zero_grad()
    other = copy.deepcopy(model)
    for net in (model, other):
        with (row.context or nullcontext)():
            row.loss(net, batch).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def test_the_page_is_that_of_the_rows() -> None:
    assert PAGE.read_text() == page(), "run `python tests/table.py`"
