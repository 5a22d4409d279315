"""The batch in the second dimension: followed where functions take it, else refused or documented.

Sizes are such that examples and steps can be told apart by nothing but what functions say: T = B.
"""

import pytest
import torch
from catalogue.row import Uses
from support.checks import assert_exact, assert_norms
from support.models import regression
from support.oracle import per_example_gradients
from support.shown import shown
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoherence as pc

B = 4


def after_lstm(function) -> nn.Module:
    """Layers after a recurrent one that has the time first."""
    return Uses(function, a=nn.LSTM(6, 5, 2), b=nn.Linear(5, 3), c=nn.LayerNorm(5)).double()


FOLLOWED = {
    "linear": lambda m, x: m.b(m.a(x)[0]).transpose(0, 1),
    "transposed": lambda m, x: m.b(m.a(x)[0].transpose(0, 1)),
    "permuted": lambda m, x: m.b(m.a(x)[0].permute(2, 1, 0).transpose(0, 2)).swapaxes(0, 1),
    "last step": lambda m, x: m.b(m.a(x)[0][-1]),
    "from the second step on": lambda m, x: m.b(m.a(x)[0][1:]).transpose(0, 1),
    "last two": lambda m, x: m.b(m.a(x)[0].split(2)[1]).transpose(0, 1),
    "joined": lambda m, x: m.b(torch.cat([m.a(x)[0], m.a(x)[0]])).transpose(0, 1),
    "some features": lambda m, x: m.b(m.a(x)[0][..., :5]).transpose(0, 1),
    "mean": lambda m, x: m.b(m.a(x)[0].mean(dim=0)),
    "largest": lambda m, x: m.b(m.a(x)[0].amax(0, keepdim=True)).squeeze(0),
    "states": lambda m, x: m.b(m.a(x)[1][0]).transpose(0, 1),
    "last state": lambda m, x: m.b(m.a(x)[1][0][-1].unsqueeze(0)).squeeze(0),
    "norm": lambda m, x: m.b(m.c(m.a(x)[0]).relu() * 2).transpose(0, 1),
    "scaled in place": lambda m, x: m.a(x)[0].mul_(m.c.weight).transpose(0, 1),
    "a number": lambda m, x: (m.c.weight[:1] * m.a(x)[0]).transpose(0, 1),
    "rolled": lambda m, x: m.b(torch.roll(m.a(x)[0], 1, 0)).transpose(0, 1),
    "moved": lambda m, x: m.b(m.a(x)[0].movedim(0, 1)),
    "folded": lambda m, x: m.b(m.a(x)[0].reshape(-1, 5)).view(*x.shape[:2], 3).swapaxes(0, 1),
    "added": lambda m, x: (m.c.weight + torch.roll(m.a(x)[0], 1, 0)).transpose(0, 1),
    "any function": lambda m, x: torch.cosine_similarity(m.a(x)[0], m.c.weight, dim=-1).T,
    "heads": lambda m, x: m.b(m.a(x)[0].view(B, -1, 1, 5)).transpose(0, 1),
}


@pytest.mark.parametrize("function", FOLLOWED.values(), ids=FOLLOWED)
def test_what_is_made_of_it(function) -> None:
    model = after_lstm(lambda m, x: function(m, x.transpose(0, 1)))
    x = torch.randn(B, B, 6, dtype=torch.float64)
    assert_exact(model, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("steps", [3, B])
def test_features_of_a_frozen_layer(grad: bool, steps: int) -> None:
    def features(m: nn.Module, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(grad):
            return m.a(x.transpose(0, 1))[0]

    for layer in (nn.GRU(6, 5), nn.TransformerEncoderLayer(6, 2, 5, 0.0)):
        width = 5 if isinstance(layer, nn.GRU) else 6
        call = features if width == 5 else lambda m, x: m.a(x.transpose(0, 1))
        model = Uses(
            lambda m, x, call=call: m.b(call(m, x)).transpose(0, 1),
            a=layer.requires_grad_(False),
            b=nn.Linear(width, 3),
        ).double()
        x = torch.randn(B, steps, 6, dtype=torch.float64)
        assert_exact(model, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=shown), False])
def test_behind_checkpoints(reentrant: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if m.training:
            found = checkpoint(m.a, m.d(x).transpose(0, 1), use_reentrant=reentrant)[0]
            return checkpoint(lambda y: m.b(y.relu()), found, use_reentrant=reentrant).swapaxes(
                0, 1
            )
        return m.b(m.a(m.d(x).transpose(0, 1))[0].relu()).transpose(0, 1)

    model = after_lstm(forward).eval()
    model.c, model.d = nn.Identity(), nn.Linear(6, 6).double()
    x = torch.randn(B, B, 6, dtype=torch.float64)
    truth = per_example_gradients(model, regression("mean"), (x,))
    with pc.collect(model.train(), pc.SqNorms()) as record:
        regression("mean")(model, (x,)).backward()
    assert_norms(record, truth, 1e-10)


MIXED = {
    "a recurrent layer that has it first": lambda m, x: m.d(m.a(x)[0])[0],
    "a convolution": lambda m, x: m.e(m.a(x)[0]),
    "over the batch": lambda m, x: m.f(m.a(x)[0]),
}


@pytest.mark.parametrize("function", MIXED.values(), ids=MIXED)
def test_what_mixes_examples_is_refused(function) -> None:
    model = after_lstm(function)
    model.d, model.e = nn.GRU(5, 2, batch_first=True).double(), nn.Conv1d(B, 2, 3).double()
    model.g = nn.GRU(6, 5).double().requires_grad_(False)
    model.f = nn.LayerNorm((B, 5)).double()
    x = torch.randn(B, B, 6, dtype=torch.float64)
    with (
        pytest.raises(pc.UnsupportedError, match=r"(?s)the batch.*What to do: "),
        pc.collect(model, pc.SqNorms(), on_unsupported="vmap"),
    ):
        model(x).square().sum().backward()


def test_a_transpose_says_where_the_batch_is() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.transpose(0, 1)).square().sum((0, 2)).mean()

    x = torch.randn(B, B, 6) * torch.arange(1, 5).view(B, 1, 1)
    pc.verify(model, loss, x)


def test_nothing_says_where_the_batch_is() -> None:
    """It is then the first dimension, as documented, unless the user marks it."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(7, B, 6)  # the time first
    for mark, size in ((False, 7), (True, B)):
        with pc.collect(model, pc.SqNorms()) as record:
            model(pc.mark_examples(x, dim=1) if mark else x).square().sum((0, 2)).mean().backward()
        assert record.batch_size == size


def test_verify_holds_for_what_says_so() -> None:
    model = Uses(lambda m, x: m.b(m.a(x.transpose(0, 1))[0][-1]), a=nn.GRU(6, 5), b=nn.Linear(5, 3))
    pc.verify(model, lambda m, x: m(x).square().sum(1).mean(), torch.randn(B, B, 6))
