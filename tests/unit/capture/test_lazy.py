"""Layers that take their shape in the first pass, which is the one that is captured."""

from collections.abc import Callable

import pytest
import torch
from support.checks import assert_norms
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

SHAPES = {1: (3, 2, 7), 2: (3, 2, 5, 6), 3: (3, 2, 4, 3, 5)}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LazyLinear": (lambda: nn.LazyLinear(4), (3, 5, 6)),
    "LazyLinear-2d": (lambda: nn.LazyLinear(4), (3, 5)),
    "LazyConv1d": (lambda: nn.LazyConv1d(4, 3), SHAPES[1]),
    "LazyConv2d": (lambda: nn.LazyConv2d(4, 3, stride=2), SHAPES[2]),
    "LazyConv3d": (lambda: nn.LazyConv3d(4, 2, bias=False), SHAPES[3]),
    "LazyConvTranspose1d": (lambda: nn.LazyConvTranspose1d(2, 3), SHAPES[1]),
    "LazyConvTranspose2d": (lambda: nn.LazyConvTranspose2d(4, 3), SHAPES[2]),
    "LazyBatchNorm2d": (lambda: nn.LazyBatchNorm2d().eval(), SHAPES[2]),
    "LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(affine=True), SHAPES[2]),
}


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return (model(*batch).flatten(1) - 0.3).square().sum(1).mean()


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_first_pass_is_exact(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Tanh(), build()).double()
    batch = (torch.randn(shape, dtype=torch.float64),)
    with pc.collect(model, pc.SqNorms()) as record:
        loss(model, batch).backward()
    assert_norms(record, per_example_gradients(model, loss, batch), 1e-9)
