"""Rows that lie anywhere as one example: each one's own loss by itself through autograd."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.layers import LAYERS, B, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import assert_coherence, assert_gram, assert_norms, assert_sums, grad_of
from support.models import MODELS, classification, make, regression
from support.oracle import LossFn, m_coherence
from torch import Tensor, nn

import pycoherence as pc

PAIRS = torch.tensor([0, 1, 0, 1])
CROSSED = torch.tensor([1, 0, 0, 1])
UNEVEN = torch.tensor([2, 0, 0, 1])
IDS = {"pairs": PAIRS, "crossed": CROSSED, "uneven": UNEVEN}
ids_of = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)

Batch = tuple[Tensor, ...]


def truth(model: nn.Module, loss_fn: LossFn, batch: Batch, ids: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss of each example's rows, `[B, *shape]`."""
    model, n = copy.deepcopy(model), int(ids.max()) + 1
    parameters = dict(model.named_parameters())
    found = {name: p.new_zeros((n, *p.shape)) for name, p in parameters.items()}
    for b in range(n):
        loss = loss_fn(model, tuple(x[ids == b] for x in batch))
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                found[name][b] = grad
    return found


def assert_exact(model: nn.Module, loss_fn: LossFn, batch: Batch, ids: Any, reduction: Any) -> None:
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    loss_fn(plain, batch).backward()
    statistics = pc.SqNorms(), pc.Gram()
    with pc.collect(ours, *statistics, loss_reduction=reduction, group_by=ids) as record:
        loss_fn(ours, batch).backward()
    gradients = truth(model, loss_fn, batch, ids)
    assert record.batch_size == int(ids.max()) + 1
    assert_norms(record, gradients, 1e-10)
    assert_gram(record, gradients, 1e-10)
    assert_coherence(record, gradients, 1e-10)
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(grad_of(q), grad_of(p))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("ids", [PAIRS, UNEVEN], ids=["pairs", "uneven"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str, ids: Tensor) -> None:
    build, shape = LAYERS[name]
    assert len(ids) == B
    model, x = randomise(build()).double(), torch.randn(shape, dtype=torch.float64)
    assert_exact(model, regression("sum"), (x,), ids, "sum")


@ids_of
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, ids: Tensor) -> None:
    model, batch = make(name, torch.float64)
    batch = tuple(x[[0, 1, 2, 0]] for x in batch)
    assert_exact(model, classification("sum"), batch, ids, "sum")
    if ids is not UNEVEN:
        assert_exact(model, classification("mean"), batch, ids, "mean")


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_any_groups(found: list[int]) -> None:
    _, ids = torch.tensor(found).unique(return_inverse=True)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    assert_exact(model, regression("sum"), (torch.randint(5, (len(ids), 2)),), ids, "sum")


class Broadcast(nn.Module):
    """A position table, a parameter without a rule, and one that is added to examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.own = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([x, self.table.expand(len(x), 3, 4)], 1)
        return self.head(tokens) + torch.trapezoid(tokens, self.own).unsqueeze(-1)


@ids_of
def test_copies_for_each_example_and_functions_without_a_rule(ids: Tensor) -> None:
    x = torch.randn(4, 2, 4, dtype=torch.float64)
    model = Broadcast().double()
    assert_exact(model, regression("sum"), (x,), ids, "sum")
    with pc.collect(model, pc.SqNorms(), group_by=ids) as record:
        regression("mean")(model, (x,)).backward()
    assert list(record.fallbacks) == ["own"]


@ids_of
def test_rows_that_the_model_sorts(ids: Tensor) -> None:
    """Owners that are ids already, as those of experts and windows."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            order = x[:, 0].argsort()
            return self.outer(self.inner(x[order]).tanh())[order.argsort()]

    x = torch.randn(4, 3, dtype=torch.float64)
    assert_exact(Sorted().double(), regression("sum"), (x,), ids, "sum")


def test_pairs_are_rearranged_by_strides_alone() -> None:
    """No gather; and consecutive rows are those of group_size."""
    from pycoherence.capture.groups import Grouping

    assert Grouping(by=torch.arange(3).repeat(2)).groups(6) == (6, 3, 1, None)
    assert Grouping(by=torch.arange(3).repeat_interleave(2)).groups(6) == Grouping(2).groups(6)
    assert Grouping(by=torch.tensor([0, 0, 1, 1] * 2)).groups(8) == (8, 2, 2, None)
    assert Grouping(by=CROSSED).groups(4).table is not None


def pair_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A loss of differences between the halves, as that of DPO."""
    chosen, rejected = model(batch[0]).sum(1).chunk(2)
    return -F.logsigmoid(0.3 * (chosen - rejected)).mean()


def pairs(rows: int = 6) -> tuple[nn.Sequential, Batch, Tensor]:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    ids = torch.arange(rows // 2).repeat(2)
    return model, (torch.randn(rows, 5, dtype=torch.float64),), ids


def halves(rows: int) -> Tensor:
    return torch.arange(rows // 2).repeat(2)


def test_a_loss_of_pairs_in_all_verbs() -> None:
    model, batch, ids = pairs()
    assert_exact(model, pair_loss, batch, ids, "mean")
    gradients = truth(model, pair_loss, batch, ids)
    coef = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    total = pc.weighted_sum(model, pair_loss, batch, coef, group_by=ids)
    assert_sums(total, gradients, coef, 1e-10)
    assert not pc.verify(model, pair_loss, batch, group_by=ids).failures
    with pytest.raises(pc.VerificationError):
        pc.verify(model, pair_loss, batch, group_size=2)
    meter = pc.CoherenceMeter(model)
    meter.update(pair_loss, batch, group_by=ids)
    more = (batch[0][:2] * 2,)
    meter.update(pair_loss, more, group_by=halves)
    both = {
        name: torch.cat([g, h])
        for (name, g), h in zip(
            gradients.items(), truth(model, pair_loss, more, halves(2)).values(), strict=True
        )
    }
    assert meter.compute().n == 4
    assert meter.compute().m == pytest.approx(m_coherence(both))


@pytest.mark.parametrize("rule", [pc.Winsorized(1), pc.Krum(0), pc.NormClip(0.1)], ids=repr)
def test_rules_over_pairs_are_those_over_consecutive_rows(rule: Any) -> None:
    def consecutive(model: nn.Module, x: Tensor) -> Tensor:
        chosen, rejected = model(x).sum(1).view(-1, 2).unbind(1)
        return -F.logsigmoid(0.3 * (chosen - rejected)).mean()

    model, batch, ids = pairs()
    other, x = copy.deepcopy(model), batch[0][ids.argsort(stable=True)]
    with pc.aggregate(model, rule, pc.SqNorms(), group_by=ids) as agg:
        pair_loss(model, batch).backward()
    with pc.aggregate(other, rule, group_size=2):
        consecutive(other, x).backward()
    assert agg.report.batch_size == agg.record.batch_size == 3
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(grad_of(p), grad_of(q))


def test_a_rule_takes_each_pair_as_one_value() -> None:
    model, batch, ids = pairs()
    gradients = truth(model, pair_loss, batch, ids)
    with pc.aggregate(model, pc.Median(), group_by=ids):
        pair_loss(model, batch).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grad_of(p), gradients[name].median(0).values)


def test_verify_repeats_the_rows_of_pairs_for_batch_norm_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 4), randomise(nn.BatchNorm1d(4)), nn.Linear(4, 3)).eval()
    batch = (torch.randn(6, 5),)
    assert not pc.verify(model, pair_loss, batch, group_by=halves).failures


def dpo_loss(model: Any, batch: Batch) -> Tensor:
    """The loss of direct preference optimisation: all chosen answers, then all rejected ones."""
    ids, mask, reference = batch
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = ((each * mask[:, 1:]).sum(1) - reference).chunk(2)
    return -F.logsigmoid(0.3 * (chosen - rejected)).mean()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_preferences_of_a_language_model(lora: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    if lora:
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False)
        with warnings.catch_warnings():  # peft asks transformers for a name that it has renamed
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(model, adapter)
    model = model.double().eval()
    ids, mask = torch.randint(40, (6, 7)), torch.ones(6, 7, dtype=torch.int64)
    mask[0, 5:] = mask[4, 4:] = 0
    batch = ids, mask, torch.randn(6, dtype=torch.float64)
    assert not pc.verify(model, dpo_loss, batch, group_by=halves, rtol=1e-6).failures

    with pc.collect(model, pc.SqNorms(), group_by=halves(6)) as record:
        dpo_loss(model, batch).backward()
    with pc.collect(model, pc.SqNorms()) as marked:
        pc.mark_examples(ids, owner=halves(6))
        dpo_loss(model, batch).backward()
    assert record.batch_size == marked.batch_size == 3
    torch.testing.assert_close(record.sq_norms, marked.sq_norms)


def test_rows_of_one_example_that_a_layer_mixes_need_a_mark() -> None:
    model, (x,), ids = pairs()

    def differences(x: Tensor) -> Tensor:
        chosen, rejected = model[0](x).chunk(2)
        return model[2](chosen - rejected).square().sum(1).mean()

    with pc.collect(model, pc.SqNorms(), group_by=ids), pytest.raises(pc.UnsupportedError):
        differences(x)
    with pc.collect(model, pc.SqNorms()) as record:
        differences(pc.mark_examples(x, owner=ids)).backward()
    weights = [p for p in model.parameters() if p.dim() == 2]
    for b in range(3):
        found = torch.autograd.grad(differences(x[ids == b]), weights)
        ours = [record.by_parameter[name].sq_norms[b] for name in ("0.weight", "2.weight")]
        torch.testing.assert_close(ours, [g.square().sum() for g in found])


def test_empty_and_single_batches() -> None:
    model = nn.Linear(3, 2)
    with pc.collect(model, pc.SqNorms(), group_by=torch.zeros(0, dtype=torch.int64)) as record:
        model(torch.ones(0, 3)).sum().backward()
    assert record.batch_size == 0
    with pc.collect(model, pc.SqNorms(), group_by=torch.zeros(1, dtype=torch.int32)) as record:
        model(torch.ones(1, 3)).sum().backward()
    assert record.sq_norms.shape == (1,)
    with (
        pc.collect(model, pc.SqNorms(), group_by=PAIRS),
        pytest.raises(pc.UnsupportedError, match=r"1 row.*group_by names the examples of 4"),
    ):
        model(torch.ones(1, 3)).sum().backward()


def test_other_numbers_of_rows_are_refused() -> None:
    model = nn.Linear(3, 2)
    message = r"its input \(6, 3\) has 6 rows, while group_by names the examples of 4"
    with pc.collect(model, pc.SqNorms(), group_by=PAIRS) as record:
        with pytest.raises(pc.UnsupportedError, match=message):
            model(torch.ones(6, 3))
        model(torch.ones(4, 3)).sum().backward()
        assert record.batch_size == 2


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1, 0, 1], TypeError, "a tensor of the example of each row.*got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "whole numbers, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "whole numbers, got torch.bool"),
        (torch.zeros(4, 1, dtype=torch.int64), ValueError, r"\[rows\], got shape \(4, 1\)"),
        (torch.tensor([0, -1]), ValueError, "from 0, got -1.*mark_examples"),
        (torch.tensor([0, 1, 3]), ValueError, "no row of example 2 though the last one is 3"),
    ],
)
def test_numbers_that_name_no_examples_are_refused(ids: Any, error: Any, message: str) -> None:
    model = nn.Linear(3, 2)
    makes = [
        lambda: pc.collect(model, pc.SqNorms(), group_by=ids),
        lambda: pc.aggregate(model, pc.Median(), group_by=ids),
        lambda: pc.weighted_sum(model, pair_loss, None, torch.ones(1), group_by=ids),
        lambda: pc.verify(model, pair_loss, None, group_by=ids),
        lambda: pc.CoherenceMeter(model).update(pair_loss, None, group_by=ids),
    ]
    for make_it in makes:
        with pytest.raises(error, match=message):
            make_it()
    given_later = pc.collect(model, pc.SqNorms(), group_by=lambda _: ids)
    with given_later, pytest.raises(error, match="group_by"):
        model(torch.ones(4, 3))


def test_both_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="either group_size or group_by, got both"):
        pc.collect(nn.Linear(3, 2), pc.SqNorms(), group_size=2, group_by=PAIRS)
