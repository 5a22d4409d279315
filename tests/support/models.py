"""Models and losses that several tests share; every size is odd where it can be."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.oracle import LossFn

Batch = tuple[Tensor, ...]

B = 5
CLASSES = 7


class MLP(nn.Sequential):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Linear(11, 13), nn.ReLU()),
            *(nn.Linear(13, 9), nn.Tanh()),
            nn.Linear(9, CLASSES),
        )

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(B, 11)


class CNN(nn.Sequential):
    """Grouped convolutions, GroupNorm and in-place activations."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6, 9, 3, stride=2, groups=3, bias=False), nn.GroupNorm(3, 9)),
            *(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(9 * 4 * 3, CLASSES)),
        )

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(B, 3, 9, 8)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).mT.chunk(3, -1)
        weights = torch.einsum("bthc,bshc->bhts", *(y.movedim(-1, 2) for y in (q, k)))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = weights.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + self.out(torch.einsum("bhts,bshc->bthc", weights, v.movedim(-1, 2)).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two pre-norm blocks over token and position embeddings."""

    def __init__(self, tokens: int = 19, width: int = 12, length: int = 10) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width, padding_idx=0)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 3), Block(width, 2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = self.blocks(self.token(ids) + self.position(positions))
        return self.head(self.norm(x)).mT  # [B, classes, T]

    @staticmethod
    def inputs() -> Tensor:
        return torch.randint(0, 19, (B, 9))


MODELS: dict[str, Callable[[], Any]] = {"mlp": MLP, "cnn": CNN, "transformer": Transformer}


def labels_for(model: nn.Module, inputs: Tensor) -> Tensor:
    """One for each example, or for each position of it."""
    shape = inputs.shape if isinstance(model, Transformer) else inputs.shape[:1]
    return torch.randint(CLASSES, shape)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch]:
    """A model by its name in `MODELS`, with fresh weights, and a batch for it."""
    torch.manual_seed(3)
    model = MODELS[name]().to(dtype)
    inputs = model.inputs()
    labels = labels_for(model, inputs)
    return model, (inputs.to(dtype) if inputs.is_floating_point() else inputs, labels)


def classification(reduction: str) -> LossFn:
    """Cross-entropy; over examples of several positions it is their mean or sum too."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction=reduction)

    return loss


def regression(reduction: str) -> LossFn:
    """A loss of any output, whose output gradients differ in every number."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = model(*batch)
        rows = out.reshape(len(out), -1) if len(out) else out.flatten(1)
        target = torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
        losses = (rows - target).square().sum(1)
        return losses.mean() if reduction == "mean" else losses.sum()

    return loss


X = torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(5, 6).sin() * 2
"""Five examples for `two_layers`."""


def two_layers() -> dict[str, nn.Module]:
    """Layers that fit each other, by name."""
    return {"a": nn.Linear(6, 4), "b": nn.Linear(4, 3)}


X4 = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(4, 6).sin()
"""Four examples for `square_mlp`."""


def square_mlp() -> nn.Sequential:
    """Square layers, whose weights have the shape of their transposes."""
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()).double()


def stepwise() -> nn.Module:
    """Layers of which nothing says where the batch is."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
