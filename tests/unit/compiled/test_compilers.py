"""Compilers take the graph of a step; results may differ from those of a block by roundings."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pycoherence as pc


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 6), torch.randint(4, (7,))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_close(step: Any, model: nn.Module) -> None:
    for _ in range(2):
        given = batch()
        model.zero_grad()
        record = step(given)
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        with pc.collect(model, pc.SqNorms()) as expected:
            mean_loss(model, given).backward()
        torch.testing.assert_close(record.sq_norms, expected.sq_norms)
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(g, p.grad)


def test_a_function_takes_the_graph() -> None:
    seen: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    step = pc.compile(model, mean_loss, pc.SqNorms(), backend=backend)
    assert_close(step, model)
    assert seen == [6]


def test_a_compiler_that_is_wrong_is_found() -> None:
    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: [x + 1 for x in graph.forward(*given)]

    step = pc.compile(nn.Linear(6, 4), mean_loss, pc.SqNorms(), backend=backend)
    with pytest.raises(pc.VerificationError, match="the gradient of 'weight'"):
        step(batch())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of Inductor
def test_inductor() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4))
    step = pc.compile(model, mean_loss, pc.SqNorms(), backend="inductor")
    assert_close(step, model)
