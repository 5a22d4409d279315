"""Memory formats: channels_last goes through, and outputs keep the strides of plain torch."""

from collections.abc import Callable

import pytest
import torch
from support.checks import assert_exact
from support.models import regression
from torch import Tensor, nn

import pycoherence as pc

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv-grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "conv-same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "group-norm": lambda: nn.GroupNorm(2, 4),
    "instance-norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "batch-norm": lambda: nn.BatchNorm2d(4).eval(),
    "layer-norm": lambda: nn.LayerNorm(6),
    "rms-norm": lambda: nn.RMSNorm(6, eps=1e-5),
    "linear": lambda: nn.Linear(6, 3),
}

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_exact_in_any_memory_format(name: str, form: str) -> None:
    x = FORMATS[form](torch.randn(3, 4, 5, 6, dtype=torch.float64))
    model = LAYERS[name]().double()
    if form == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    assert_exact(model, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_have_the_strides_of_plain_torch(name: str, form: str) -> None:
    """Else a later `view` that works without the block breaks inside it."""
    x, layer = FORMATS[form](torch.randn(3, 4, 5, 6)), LAYERS[name]()
    plain = layer(x)
    with pc.collect(layer, pc.SqNorms()):
        assert layer(x).stride() == plain.stride()


@pytest.mark.parametrize("name", ["conv", "group-norm", "batch-norm"])
def test_gradients_have_the_strides_of_the_parameter(name: str) -> None:
    layer = LAYERS[name]().to(memory_format=torch.channels_last)
    x = FORMATS["channels_last"](torch.randn(3, 4, 5, 6))
    with pc.collect(layer, pc.SqNorms()):
        layer(x).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.stride() == parameter.stride()
