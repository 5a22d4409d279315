"""`verify` passes whole models, and names the parameter whose site is wrong."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from rows import models
from table import Row
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.capture import Call, Capture, saved
from pycoherence.capture._registry import handlers
from pycoherence.sites import LinearSite

ROWS = {f"{row.topic}: {row.name}": row for row in models.ROWS}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_passes(row: Row) -> None:
    model = row.build().double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in row.batch)
    assert pc.verify(model, row.loss, batch).failures == []


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(handlers)
    yield
    handlers.clear()
    handlers.update(before)


class Wrong(torch.autograd.Function):
    """`x @ weight`, whose site forgets the last position."""

    @staticmethod
    def forward(ctx, call: Call, x: Tensor, weight: Tensor, *probes: Tensor) -> Tensor:
        call.save(ctx, x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = saved(ctx)
        site = LinearSite(g[:, :-1], x[:, :-1])
        return None, g @ weight.T, *ctx.call.gradients(weight=site)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum((1, 2)).mean()


def test_fails_at_the_parameter_of_a_wrong_site(registry: None) -> None:
    model = nn.Sequential(nn.Linear(6, 5), Product(), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    pc.verify(model, loss, x)

    @pc.register_site(torch.matmul)
    def wrong(capture: Capture, input: Tensor, other: Tensor) -> Tensor:
        call = capture.call(input, weight=other)
        return Wrong.apply(call, input, other, *call.probes)

    with pytest.raises(pc.VerificationError, match=r"1 of 5 parameters:\n  1\.weight: ") as error:
        pc.verify(model, loss, x)
    assert "Likely causes" in str(error.value)


def test_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="expected a torch function, got str"):
        pc.register_site("linear")  # pyright: ignore[reportArgumentType]


def test_the_registry_is_restored() -> None:
    assert handlers[torch.matmul].__module__ == "pycoherence.capture.matmul"
    assert handlers[F.linear].__module__ == "pycoherence.capture.linear"
