"""`verify` passes whole models, and names the parameter whose site is wrong."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Row
from catalogue.rows import models, rows_of
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.capture.context import handlers
from pycoherence.capture.rows import Rows
from pycoherence.sites import LinearSite, Site

ROWS = {f"{row.topic}: {row.name}": row for row in rows_of(models)}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_passes(row: Row) -> None:
    model, batch = row.in_float64()
    assert pc.verify(model, row.loss, batch).failures == []


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(handlers)
    yield
    handlers.clear()
    handlers.update(before)


class Wrong(pc.LayerRule):
    """`x @ weight`, whose site forgets the last position."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return x @ weight, (x, weight)

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return g @ weight.T

    def factors(self, rows: Rows, g: Tensor, x: Tensor, weight: Tensor) -> list[Site]:
        return [LinearSite(rows(g)[:, :-1], rows(x)[:, :-1])]


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

    pc.register_site(torch.matmul)(Wrong)
    with pytest.raises(pc.VerificationError, match=r"1 of 5 parameters:\n  1\.weight: ") as error:
        pc.verify(model, loss, x)
    assert "Likely causes" in str(error.value)


def test_the_registry_is_restored() -> None:
    assert handlers[torch.matmul].__module__ == "pycoherence.capture.functions.product"
    assert handlers[F.linear].__module__ == "pycoherence.capture.functions.linear"
