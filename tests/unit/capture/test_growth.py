"""Many steps take no more memory than a few, and a block leaves nothing behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Uses
from support.models import X4
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoherence as pc

pytestmark = pytest.mark.slow

X = X4.float()


def parts() -> nn.Module:
    """Layers, shared parameters, and what is made of parameters."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.linear(F.linear(x, m.p).tanh(), m.p) * m.scale + m.scale
        x = F.linear(x, m.p.exp() * m.scale) + x @ m.p.mT
        return m.layers(x)

    layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    return Uses(forward, p=torch.randn(6, 6) / 3, scale=torch.randn(6), layers=layers)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def collected(model: nn.Module) -> Any:
    with pc.collect(model, pc.SqNorms(), pc.Gram(), keep_factors=True) as record:
        loss(model, X).backward()
    return record.sq_norms.sum(), record


def used_up(model: nn.Module) -> Any:
    return collected(model)[1].weighted_sum(torch.ones(4))


def winsorized(model: nn.Module) -> Any:
    with pc.aggregate(model, pc.Winsorized(1)) as aggregate:
        loss(model, X).backward()
    return aggregate.report


def clipped(model: nn.Module) -> Any:
    with pc.aggregate(model, pc.NormClip(0.1)) as aggregate:
        loss(model, X).backward()
    return aggregate.report


def under_autocast(model: nn.Module) -> Any:
    with pc.collect(model, pc.SqNorms()) as record, torch.autocast("cpu", torch.bfloat16):
        loss(model, X).backward()
    return record


def checkpointed(model: nn.Module) -> Any:
    with pc.collect(model, pc.SqNorms()) as record:
        checkpoint(model, X, use_reentrant=False).square().mean().backward()
    return record


def without_backward(model: nn.Module) -> Any:
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, X)
    return record


def refused(model: nn.Module) -> Any:
    with pytest.raises(pc.UnsupportedError), pc.collect(model, pc.SqNorms()):
        (loss(model, X) + model.p.norm()).backward()


STEPS = [collected, used_up, winsorized, clipped]
STEPS += [under_autocast, checkpointed, without_backward, refused]


def alive() -> tuple[int, int]:
    """How many tensors there are, and how many numbers in them."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return len(found), sum(x.untyped_storage().nbytes() for x in found)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_steps_do_not_grow(step: Callable[[nn.Module], Any]) -> None:
    model = parts()
    for _ in range(3):
        kept = step(model)
    before = alive()
    for _ in range(8):
        kept = step(model)
    assert alive() == before
    assert kept is not model


def test_two_hundred_steps_of_training_do_not_grow() -> None:
    model = parts()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            collected(model)
            optimizer.step()

    train(5)
    before, objects = alive(), len(gc.get_objects())
    train(200)
    assert alive() == before
    assert len(gc.get_objects()) < objects + 100


@pytest.mark.parametrize("step", STEPS[:6], ids=lambda step: step.__name__)
def test_no_garbage_waits_to_be_collected(step: Callable[[nn.Module], Any]) -> None:
    """What a pass leaves goes at once: cycles would hold activations until the collector runs."""
    model = parts()
    step(model)
    gc.collect()
    gc.disable()
    try:
        before = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
        step(model)
        after = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    finally:
        gc.enable()
    known = {id(x) for x in before}
    new = [tuple(x.shape) for x in after if id(x) not in known and x is not before]
    assert len(new) <= len(list(model.parameters())), new


def test_a_record_holds_statistics_alone() -> None:
    """Neither activations nor what was made of parameters."""
    model = parts()
    seen: list[weakref.ref[Tensor]] = []
    model.layers[0].register_forward_hook(lambda m, i, o: seen.extend(map(weakref.ref, (*i, o))))
    with pc.collect(model, pc.SqNorms()) as record:
        made = model.p.exp()
        seen.append(weakref.ref(made))
        F.linear(model(X), torch.ones(3, 2)).square().mean().backward()
        del made
    gc.collect()
    assert record.sq_norms.shape == (4,)
    assert [x() for x in seen] == [None] * len(seen)
