"""Attention and recurrent layers: as torch computes them, whatever is frozen, with dropout."""

import copy
import warnings

import pytest
import torch
from catalogue.row import Uses
from support.checks import assert_exact, assert_norms, assert_sums, relative_error
from support.models import regression
from torch import Tensor, nn

import pycoherence as pc

B, T = 4, 3


def first(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x)[0]


def itself(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x, x, x)[0]


def quietly(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x, x, x, need_weights=False)[0]


LAYERS = {
    "lstm": lambda: Uses(
        first, a=nn.LSTM(6, 5, 3, dropout=0.4, batch_first=True, bidirectional=True)
    ),
    "gru": lambda: Uses(first, a=nn.GRU(6, 5, 2, dropout=0.4, batch_first=True)),
    "rnn": lambda: Uses(first, a=nn.RNN(6, 5, 2, dropout=0.4, batch_first=True)),
    "attention": lambda: Uses(itself, a=nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True)),
    "attention-without-weights": lambda: Uses(
        quietly, a=nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True)
    ),
    "encoder-with-the-time-first": lambda: Uses(
        lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1),
        a=nn.TransformerEncoderLayer(6, 2, 5, 0.4, norm_first=True),
    ),
    "encoder": lambda: Uses(
        lambda m, x: m.a(x), a=nn.TransformerEncoderLayer(6, 2, 5, 0.4, batch_first=True)
    ),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_dropout_is_as_torch_draws_it_on_the_cpu(build) -> None:
    model, x = build().double(), torch.randn(B, T, 6, dtype=torch.float64)

    def losses() -> Tensor:
        torch.manual_seed(5)
        return model(x).sin().flatten(1).sum(1)

    coef = torch.linspace(-1, 2, B, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    truth = [torch.autograd.grad(losses()[b], [*parameters.values()]) for b in range(B)]
    with pc.collect(model, pc.SqNorms(), keep_factors=True) as record:
        losses().mean().backward()
    rows = dict(zip(parameters, map(torch.stack, zip(*truth, strict=True)), strict=True))
    assert_norms(record, rows, 1e-10)
    assert_sums(record.weighted_sum(coef), rows, coef, 1e-10)


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_groups_of_rows(build) -> None:
    model, x = build().double().eval(), torch.randn(6, T, 6, dtype=torch.float64)
    assert_exact(model, regression("mean"), (x,), torch.float64, group_size=3)


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_each_parameter_alone(build) -> None:
    model, x = build().double().eval(), torch.randn(B, T, 6, dtype=torch.float64)
    for name, _ in model.named_parameters():
        part = copy.deepcopy(model).requires_grad_(False)
        part.get_parameter(name).requires_grad_()
        assert_exact(part, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_all_but_one_parameter(build) -> None:
    model, x = build().double().eval(), torch.randn(B, T, 6, dtype=torch.float64)
    for name in [name for name, _ in model.named_parameters()][:3]:
        part = copy.deepcopy(model)
        part.get_parameter(name).requires_grad_(False)
        assert_exact(part, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_autocast(build) -> None:
    model, x = build().eval(), torch.randn(B, T, 6)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with pc.collect(model, pc.SqNorms()) as record:
            found = model(x)
            found.float().square().mean().backward()
    assert relative_error(found.float(), plain.float()) < 0.03
    assert record.sq_norms.isfinite().all()


def test_the_fast_path_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute whole layers bypassing the capture."""

    def fast(*args: object) -> None:
        raise AssertionError("the fast path was taken")

    layer = nn.TransformerEncoderLayer(6, 2, 5, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(B, T, 6), torch.zeros(B, T, dtype=torch.bool)
    padding[0, 2] = True
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        expected = model(x, src_key_padding_mask=padding)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fast)
    monkeypatch.setattr(torch, "_native_multi_head_attention", fast)
    with torch.no_grad(), pytest.raises(AssertionError, match="fast path"):
        model(x, src_key_padding_mask=padding)
    with pc.collect(model, pc.SqNorms()) as record:
        found = model(x, src_key_padding_mask=padding)
        found.square().mean().backward()
    assert (found - expected)[~padding].abs().max() < 1e-5
    assert set(record.by_parameter) == {name for name, _ in model.named_parameters()}
    assert all(one.sq_norms.isfinite().all() for one in record.by_parameter.values())


def test_a_sequence_without_a_batch_is_one_example() -> None:
    model = nn.LSTM(6, 5, bidirectional=True).double()
    x = torch.randn(T, 6, dtype=torch.float64)
    with pc.collect(model, pc.SqNorms()) as record:
        model(x)[0].square().mean().backward()
    assert record.batch_size == 1
    for name, parameter in model.named_parameters():
        expected = parameter.grad.square().sum()
        assert relative_error(record.by_parameter[name].sq_norms[0], expected) < 1e-12


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_no_examples(kind) -> None:
    model = Uses(first, a=kind(6, 5, batch_first=True))
    with pc.collect(model, pc.SqNorms()) as record:
        model(torch.randn(0, T, 6)).sum().backward()
    assert record.sq_norms.shape == (0,)


def test_what_torch_refuses() -> None:
    model = Uses(first, a=nn.LSTM(6, 5, batch_first=True))
    with pytest.raises(RuntimeError, match="sequence length"), pc.collect(model, pc.SqNorms()):
        model(torch.randn(B, 0, 6))
    model = Uses(
        lambda m, x: m.a(x, x, x, attn_mask=torch.zeros(1, T))[0], a=nn.MultiheadAttention(6, 2)
    )
    with pytest.raises(RuntimeError, match="attn_mask"), pc.collect(model, pc.SqNorms()):
        model(torch.randn(T, B, 6))
