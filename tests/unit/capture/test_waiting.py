"""No step of a block needs a number of a tensor, for which a GPU would have to be waited.

Tensors of the device "meta" have none: whoever asks for one fails. The ops give empty results of
the right shapes; that they do not wait on a GPU either is shown where they are compiled. Copies
from the host are not seen here.
"""

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import frozen, linear, normal, uses
from torch import Tensor, nn

import pycoherence as pc
from bench.shared.tasks import GPT, cnn, loss
from pycoherence.capture import answers
from pycoherence.ops import specs
from pycoherence.ops.core import call
from pycoherence.sites import _site


@pytest.fixture(autouse=True)
def shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers._answers.clear()  # the first step of a process must not wait either
    for module in (_site, call):
        monkeypatch.setattr(module, "call_unchecked", lambda op, *args: specs[op].fake(*args))


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device="meta")


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    model = GPT(vocabulary=8, length=4, width=8, layers=2, heads=2, mean=False)
    return model, ids(3, 4), ids(3, 4)


def images() -> tuple[nn.Module, Tensor, Tensor]:
    return cnn(), torch.empty(3, 3, 32, 32, device="meta"), ids(3)


def movements(m: nn.Module, x: Tensor) -> Tensor:
    """Movements of all kinds, none of them by numbers."""
    x = torch.cat([m.token.expand(len(x), 1, 6), x], 1)
    x = x + torch.stack([m.places] * len(x)) + m.places.repeat(len(x), 1, 1)
    both = m.frozen(x).new_zeros(*x.shape[:2], 12)
    both[..., :6].copy_(m.frozen(x))
    both[..., 6:].copy_(x)
    x = both[..., :6] + both[..., 6:].flip(0)[:, :, :1].detach().mean()
    x = m.inside(x.roll(1, 1).flip(1)).unflatten(1, (2, 4)).transpose(1, 2)
    left, right = F.pad(x, (0, 0, 0, 2))[:, :, :2].unbind(2)
    return m.out(torch.stack([left, right], 1).repeat(1, 1, 2, 1).mean((1, 2)))


WINDOWS = {
    "inside": linear(6, 6),
    "out": linear(6, 5),
    "token": normal(1, 1, 6),
    "places": normal(8, 6),
    "frozen": frozen(lambda: nn.Conv1d(8, 8, 3, padding=1, groups=2)),
}


def windows() -> tuple[nn.Module, Tensor, Tensor]:
    return uses(movements, **WINDOWS)(), torch.empty(3, 7, 6, device="meta"), ids(3)


@pytest.mark.parametrize("make", [gpt, images, windows])
def test_a_step_waits_for_nothing(make) -> None:
    model, x, y = make()
    model = model.to("meta")
    with pc.collect(model, pc.SqNorms(), pc.Moments()) as record:
        loss(model(x), y).backward()
    assert record.sq_norms.shape == (3,)
    assert record.sq_norms.is_meta
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
