"""Blocks leave records and reports, of empty batches too; `verify` checks the batch size."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from catalogue.row import linear, normal, uses
from support.models import stepwise
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

D = torch.float64
Reduction = Literal["mean", "sum"]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Sentinel:
    """Something that can be looked for."""


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch": saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
copies = pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)


def measured(model: nn.Module, x: Tensor, **options: Any) -> pc.Record:
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    statistics = (pc.SqNorms(), pc.Gram(), pc.Dots(direction), pc.Moments(), pc.SignSum())
    with pc.collect(model, *statistics, **options) as record:
        loss(model, x).backward()
    return record


@copies
@pytest.mark.parametrize("keep", [False, True], ids=["", "factors"])
def test_records_can_be_copied(made: Callable[[Any], Any], keep: bool) -> None:
    record = measured(stepwise(), torch.randn(5, 3, dtype=D), keep_factors=keep)
    other = made(record)
    assert repr(other) == repr(record)
    assert other.batch_size == 5
    for name in ("sq_norms", "gram", "dots"):
        assert torch.equal(getattr(other, name), getattr(record, name))
    assert list(other.by_parameter) == list(record.by_parameter)
    for name, one in record.by_parameter.items():
        for field in ("sq_norms", "gram", "dots", "first_moment", "second_moment", "sign_sum"):
            assert torch.equal(getattr(other.by_parameter[name], field), getattr(one, field))
    assert other.coherence() == record.coherence()
    with pytest.raises(AttributeError, match="by_parameter"):
        _ = other.sign_sum


@pytest.mark.parametrize("name", ["pickle", "torch", "deepcopy"])
def test_copies_have_factors_of_their_own(name: str) -> None:
    record, coef = (
        measured(stepwise(), torch.randn(5, 3, dtype=D), keep_factors=True),
        torch.ones(5),
    )
    other = COPIES[name](record)
    theirs, mine = other.weighted_sum(coef), record.weighted_sum(coef)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(RuntimeError, match="used and freed"):
        other.weighted_sum(coef)


@pytest.mark.parametrize("name", ["pickle", "torch", "deepcopy"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_copies_of_factors_that_are_lost_are_noticed(name: str, before: int) -> None:
    """However often the batch had been changed in place before the pass."""
    x = torch.randn(5, 3, dtype=D)
    for _ in range(before):
        x.add_(1)
    record = measured(stepwise(), x, keep_factors=True)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        COPIES[name](record).weighted_sum(torch.ones(5))


@copies
@pytest.mark.parametrize(
    "rule",
    [
        pc.NormClip(0.5, noise_multiplier=1.0),
        pc.NormClip(0.5, per="parameter"),
        pc.Winsorized(1),
        pc.SignAgreement(0.5),
        pc.Krum(1),
        pc.GeometricMedian(),
    ],
    ids=str,
)
def test_reports_can_be_copied(made: Callable[[Any], Any], rule: Any) -> None:
    model = stepwise()
    with pc.aggregate(model, rule) as agg:
        loss(model, torch.randn(7, 3, dtype=D)).backward()
    report, other = agg.report, made(agg.report)
    assert repr(other) == repr(report)
    assert other.batch_size == 7
    assert set(other.by_parameter) == set(report.by_parameter)


@copies
def test_errors_of_incomplete_records_are_kept(made: Callable[[Any], Any]) -> None:
    model = stepwise()
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, torch.randn(4, 3, dtype=D))
    other = made(record)
    assert other.batch_size == 4
    with pytest.raises(RuntimeError, match="no backward pass has run on this batch of 4"):
        _ = other.sq_norms


@pytest.mark.parametrize("keep", [False, True], ids=["", "factors"])
def test_records_keep_no_model_and_no_graph_alive(keep: bool) -> None:
    model, x = stepwise(), torch.randn(5, 3, dtype=D)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), keep_factors=keep) as record:
        out = model(x)
        value = out.square().sum(1).mean()
        value.backward()
    out.grad_fn.metadata["of the graph"] = node = Sentinel()  # a node itself has no weak references
    gone = [weakref.ref(thing) for thing in (model, model[0].weight, out, value, node)]
    del model, out, value, node
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5
    assert record.sq_norms.shape == (5,)
    assert not record.gram.requires_grad


@pytest.mark.parametrize("rule", [pc.NormClip(0.5), pc.Median()], ids=str)
def test_reports_keep_no_model_alive(rule: Any) -> None:
    model, x = stepwise(), torch.randn(5, 3, dtype=D)
    with pc.aggregate(model, rule) as agg:
        value = loss(model, x)
        value.backward()
    report = agg.report
    gone = [weakref.ref(thing) for thing in (model, model[0].weight, value)]
    del model, value, agg
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    assert report.batch_size == 5


def test_a_record_that_lives_on_in_a_list_of_many() -> None:
    """A hundred passes leave nothing but numbers."""
    model, records, seen = stepwise(), [], []
    for _ in range(3):
        x = torch.randn(5, 3, dtype=D)
        records.append(measured(model, x))
        seen.append(weakref.ref(x))
        del x
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert pickle.loads(pickle.dumps(records))[2].batch_size == 5


# Batches of no examples, such as Poisson sampling draws.


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(torch.cat([m.positions[:, :1].expand(len(x), -1, -1), x], 1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[1].weight = model[0].weight
    return model


def bags(last: bool) -> Callable[[], nn.Module]:
    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        return m.bags(ids.flatten(), torch.arange(0, ids.numel() + last, 3))

    return uses(forward, bags=lambda: nn.EmbeddingBag(9, 4, include_last_offset=last))


def of_words(*shape: int) -> Tensor:
    return torch.randint(9, shape)


def of_numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, 4)


POSITIONS = {"positions": normal(1, 3, 4), "out": linear(4, 2)}
weight_norm = nn.utils.parametrizations.weight_norm
EMPTY: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 2), of_numbers),
    "positions": (uses(lambda m, x: m.out(x + m.positions), **POSITIONS), of_numbers),
    "class-token": (uses(class_token, **POSITIONS), of_numbers),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), of_numbers),
    "tied": (tied, of_words),
    "weight-norm": (lambda: weight_norm(nn.Linear(4, 2)), of_numbers),
    "bags": (bags(False), of_words),
    "bags-and-their-end": (bags(True), of_words),
}
empty = pytest.mark.parametrize("name", EMPTY)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def none_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, batch = EMPTY[name]
    return build(), batch(0, 3)


def total(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


@empty
@reductions
def test_statistics_of_none(name: str, reduction: Reduction) -> None:
    model, x = none_of(name)
    statistics = (pc.SqNorms(), pc.Gram(), pc.Moments(), pc.SignSum())
    with pc.collect(model, *statistics, loss_reduction=reduction, keep_factors=True) as record:
        total(model, x).backward()
    assert record.batch_size == 0
    assert record.sq_norms.shape == (0,)
    assert record.gram.shape == (0, 0)
    for name_, p in model.named_parameters():
        assert record.by_parameter[name_].sign_sum.shape == p.shape
        assert p.grad is None or p.grad.count_nonzero() == 0
    sums = record.weighted_sum(torch.zeros(0))
    assert {n: s.shape for n, s in sums.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(s.count_nonzero() == 0 for s in sums.values())


@empty
@reductions
@pytest.mark.parametrize("rule", [pc.Median(), pc.Winsorized(1), pc.SignAgreement(0.5)], ids=str)
def test_robust_gradients_of_none(name: str, reduction: Reduction, rule: Any) -> None:
    model, x = none_of(name)
    with pc.aggregate(model, rule, loss_reduction=reduction) as agg:
        total(model, x).backward()
    assert agg.report.batch_size == 0
    for p in model.parameters():
        assert p.grad is None or p.grad.count_nonzero() == 0


def clipped(
    model: nn.Module, x: Tensor, reduction: Reduction, per: Any, expected: float | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rule = pc.NormClip(0.5, 2.0, generator, per=per, expected_batch_size=expected)
    model = copy.deepcopy(model)
    with pc.aggregate(model, rule, loss_reduction=reduction) as agg:
        total(model, x).backward()
    assert agg.report.batch_size == len(x)
    return [p.grad for p in model.parameters()]


@empty
@reductions
@pytest.mark.parametrize("per", ["network", "parameter"])
def test_noise_of_none_is_that_of_a_sum(name: str, reduction: Reduction, per: Any) -> None:
    model, x = none_of(name)
    expected = None if reduction == "sum" else 4
    found = clipped(model, x, reduction, per, expected)
    parts = len(found) if per == "parameter" else 1
    generator = torch.Generator().manual_seed(3)
    for p, g in zip(model.parameters(), found, strict=True):
        noise = torch.randn(p.shape, generator=generator) * 2.0 * 0.5 * parts**0.5
        torch.testing.assert_close(g, noise / (expected or 1))


@empty
def test_noise_of_no_mean_is_refused(name: str) -> None:
    model, x = none_of(name)
    with pytest.raises(ValueError, match=r"empty batch has no mean.* expected_batch_size="):
        clipped(model, x, "mean", "network")


@reductions
def test_noise_does_not_depend_on_the_batch(reduction: Reduction) -> None:
    """A sum has the same for any number of examples; a mean divides it by one that is given."""
    model = nn.Linear(4, 2, bias=False)
    expected = None if reduction == "sum" else 4
    noises = []
    for n in (0, 1, 5):
        x = torch.zeros(n, 4)  # nothing to clip: what is left is the noise
        (found,) = clipped(model, x, reduction, "network", expected)
        noises.append(found)
    torch.testing.assert_close(noises[0], noises[1])
    torch.testing.assert_close(noises[0], noises[2])
    (drawn,) = clipped(model, torch.zeros(5, 4), reduction, "network")
    torch.testing.assert_close(drawn, noises[0] * (1 if expected is None else expected / 5))


@empty
@reductions
def test_weighted_sums_of_none(name: str, reduction: Reduction) -> None:
    model, x = none_of(name)
    for coef in (torch.zeros(0), lambda record: record.sq_norms.rsqrt()):
        found = pc.weighted_sum(model, total, x, coef, loss_reduction=reduction)
        assert all(s.count_nonzero() == 0 for s in found.values())
        assert {n: s.shape for n, s in found.items()} == {
            n: p.shape for n, p in model.named_parameters()
        }


@empty
@reductions
def test_a_meter_that_is_given_none(name: str, reduction: Reduction) -> None:
    model, none = none_of(name)
    some = EMPTY[name][1](5, 3)
    meters = [pc.CoherenceMeter(model, loss_reduction=reduction) for _ in range(2)]
    for meter, batches in zip(meters, ([some], [none, some, none]), strict=True):
        for batch in batches:
            meter.update(total, batch)
    assert meters[0].compute() == meters[1].compute()
    assert meters[1].compute().n == 5
    alone = pc.CoherenceMeter(model, loss_reduction=reduction)
    alone.update(total, none)
    with pytest.raises(RuntimeError, match="seen no example"):
        alone.compute()


# What `verify` makes of the size that the capture found.


def squares(model: nn.Module, batch: Any) -> Tensor:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    return model(*inputs).square().flatten(1).sum(1).mean()


def test_one_time_for_all_is_right_or_noticed() -> None:
    """`[1, 1]` made by the caller may be a batch of one; then `verify` says so."""
    # All it trains has one row, whatever the batch is, and it is looked at from outside alone.
    model = uses(lambda m, x, at: x * m.time(at), time=linear(1, 4))().double()
    batch = (torch.randn(5, 4, dtype=D), torch.full((1, 1), 0.3, dtype=D))
    truth = per_example_gradients(model, lambda m, part: squares(m, (*part, batch[1])), (batch[0],))
    with pc.collect(model, pc.SqNorms()) as record:
        squares(model, batch).backward()
    assert record.batch_size == 5
    expected = sum(g.flatten(1).square().sum(1) for g in truth.values())
    torch.testing.assert_close(record.sq_norms, expected, rtol=1e-10, atol=0)
    assert not pc.verify(model, squares, batch).failures


def test_verify_compares_the_size_with_the_batch() -> None:
    """A time-first batch without a mark: the steps were taken for examples."""
    model, steps = nn.Linear(3, 2).double(), torch.randn(7, 4, 3, dtype=D)

    def time_first(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.transpose(0, 1).contiguous()).square().sum((0, 2)).mean()

    assert not pc.verify(model, time_first, steps).failures

    def hidden(model: nn.Module, x: Tensor) -> Tensor:
        h = torch.from_numpy(x.numpy().transpose(1, 0, 2).copy())  # what no rule can follow
        return model(h).square().sum((0, 2)).mean()

    with pytest.raises(pc.VerificationError, match=r"found 4 examples.*7 rows.*mark_examples"):
        pc.verify(model, hidden, steps)


@pytest.mark.parametrize("size", [1, 4])
@reductions
def test_batch_norm_in_eval_mode(size: int, reduction: Reduction) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 1)
    ).double()
    with torch.no_grad():
        model(torch.randn(8, 2, 5, 4, dtype=D))
        for p in model[1].parameters():
            p.copy_(torch.randn_like(p))
    model.eval()
    x = torch.randn(size, 2, 5, 4, dtype=D)

    def transposed(model: nn.Module, batch: Any) -> Tensor:
        (x,) = batch if isinstance(batch, tuple) else (batch,)
        each = (model(x).mT * torch.linspace(1, 2, 4, dtype=D).unsqueeze(1)).square()
        each = each.flatten(1).sum(1)
        return each.mean() if reduction == "mean" else each.sum()

    assert not pc.verify(model, transposed, x, loss_reduction=reduction).failures
    # Two equal examples, since torch alone may be wrong for one.
    truth = [
        per_example_gradients(
            model, lambda m, part: transposed(m, (torch.cat([part[0]] * 2),)), (x[b : b + 1],)
        )
        for b in range(size)
    ]
    with pc.collect(model, pc.SqNorms(), loss_reduction=reduction) as record:
        transposed(model, x).backward()
    scale = 1 if reduction == "mean" else 0.25
    expected = torch.cat([sum(g.flatten(1).square().sum(1) for g in t.values()) for t in truth])
    torch.testing.assert_close(record.sq_norms, expected * scale, rtol=1e-10, atol=0)
