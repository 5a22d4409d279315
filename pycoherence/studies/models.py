"""Small networks for images; none mixes examples, unless a ResNet is told to."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from pycoherence.studies.data import Data


class Network(Protocol):
    """A kind of network, to be built for a data set."""

    def build(self, data: Data) -> nn.Module:
        """A fresh one, from torch's global random numbers."""
        ...


@dataclass(frozen=True)
class MLP:
    """Hidden layers of ReLU; `widths` are theirs, `dropout` follows each."""

    widths: tuple[int, ...] = (256, 256)
    dropout: float = 0.0

    def build(self, data: Data) -> nn.Module:
        """See `Network.build`."""
        layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
        inputs = data.images[0].numel()
        for i, width in enumerate(self.widths, start=1):
            layers[f"hidden{i}"] = nn.Linear(inputs, width)
            layers[f"relu{i}"] = nn.ReLU()
            if self.dropout:
                layers[f"dropout{i}"] = nn.Dropout(self.dropout)
            inputs = width
        layers["output"] = nn.Linear(inputs, data.classes)
        return nn.Sequential(layers)


@dataclass(frozen=True)
class CNN:
    """Convolutions of 3 x 3 with GroupNorm and ReLU, each but the first halving the image.

    Attributes:
        pooled: Whether the output sees the mean of each channel, or every place on its own.
    """

    channels: tuple[int, ...] = (16, 32)
    pooled: bool = True

    def build(self, data: Data) -> nn.Module:
        """See `Network.build`."""
        layers = OrderedDict[str, nn.Module]()
        inputs = data.images.shape[1]
        for i, width in enumerate(self.channels, start=1):
            layers[f"conv{i}"] = _conv(inputs, width, stride=1 if i == 1 else 2)
            layers[f"norm{i}"] = _norm(width)
            layers[f"relu{i}"] = nn.ReLU()
            inputs = width
        if self.pooled:
            layers["pool"] = nn.AdaptiveAvgPool2d(1)
        else:
            # A convolution with padding that halves rounds up, and each but the first does.
            halvings = 2 ** (len(self.channels) - 1)
            inputs *= math.prod(-(-side // halvings) for side in data.images.shape[2:])
        layers["flatten"] = nn.Flatten()
        layers["output"] = nn.Linear(inputs, data.classes)
        return nn.Sequential(layers)


@dataclass(frozen=True)
class Softmax:
    """A network that ends in a softmax, from which cross-entropy takes another: losses are bounded.

    They lie between log(1 + (classes - 1) / e) and 1 more.
    """

    network: Network

    def build(self, data: Data) -> nn.Module:
        """See `Network.build`."""
        return nn.Sequential(OrderedDict(network=self.network.build(data), softmax=nn.Softmax(1)))


@dataclass(frozen=True)
class ResNet:
    """A convolution, then residual blocks, each but the first halving the image.

    Attributes:
        norm: GroupNorm, or BatchNorm, which has no per-example gradients in training.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    norm: Literal["group", "batch"] = "group"

    def build(self, data: Data) -> nn.Module:
        """See `Network.build`."""
        first, norm = self.channels[0], nn.BatchNorm2d if self.norm == "batch" else _norm
        layers = OrderedDict[str, nn.Module](conv=_conv(data.images.shape[1], first, 1))
        inputs = first
        for i, width in enumerate(self.channels, start=1):
            layers[f"block{i}"] = Block(inputs, width, 1 if i == 1 else 2, norm)
            inputs = width
        layers.update(norm=norm(inputs), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1))
        layers.update(flatten=nn.Flatten(), output=nn.Linear(inputs, data.classes))
        return nn.Sequential(layers)


class Block(nn.Module):
    """Two convolutions after a norm and ReLU, added to a shortcut (He et al. 2016, v2)."""

    def __init__(
        self, inputs: int, width: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), _conv(inputs, width, stride)
        self.norm2, self.conv2 = norm(width), _conv(width, width, 1)
        same = inputs == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` to `[B, width, H / stride, W / stride]`."""
        y = self.conv1(F.relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(y)))


def _conv(inputs: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, width), width)
