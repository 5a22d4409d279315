"""Models, with a batch for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycoherence as pc


@dataclass(frozen=True)
class Task:
    """A model and a batch to train it on."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        """The mean over the batch."""
        return loss(self.model(self.x), self.y)

    def losses(self) -> Tensor:
        """The loss of each example, `[B]`."""
        logits = self.model(self.x).flatten(0, -2)
        found = F.cross_entropy(logits, self.y.flatten(), reduction="none")
        return found.view(len(self.y), -1).mean(1)


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """The mean over examples, and over their positions if they have any."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def plain(task: Task) -> None:
    """A step."""
    task.model.zero_grad()
    task.loss().backward()


def with_norms(task: Task) -> Tensor:
    """A step that gives the squared norms of the examples' own gradients, `[B]`."""
    task.model.zero_grad()
    with pc.collect(task.model, pc.SqNorms()) as record:
        task.loss().backward()
    return record.sq_norms


def mlp() -> nn.Module:
    """784-1024-1024-10 with ReLU."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Module:
    """3x3 convolutions 3-32-64-128-128 with strides 1, 2, 2, 1 and ReLU, mean pool, linear."""
    layers: list[nn.Module] = []
    channels = (3, 32, 64, 128, 128)
    for i, o, stride in zip(channels[:-1], channels[1:], (1, 2, 2, 1), strict=True):
        layers += [nn.Conv2d(i, o, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each behind a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """Pre-norm transformer; its logits are those of all positions, or their mean."""

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, heads: int, mean: bool
    ) -> None:
        super().__init__()
        self.mean = mean
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # Expanded, so that every example looks its own positions up.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = self.blocks(self.tokens(ids) + self.positions(positions))
        logits = self.head(self.norm(x))
        return logits.mean(1) if self.mean else logits


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut, and group normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(point, nn.GroupNorm(32, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def resnet18(widths: Sequence[int], classes: int) -> nn.Module:
    """The network of He et al. 2015, with group instead of batch normalisation."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False),
        nn.GroupNorm(32, widths[0]),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    for i, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        layers += [Residual(inputs, outputs, 2 if i else 1), Residual(outputs, outputs, 1)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)
    )


def _mlp_task(batch: int) -> Task:
    return Task(mlp(), torch.randn(batch, 784), torch.randint(10, (batch,)))


def _cnn_task(batch: int) -> Task:
    return Task(cnn(), torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


def _gpt_task(batch: int) -> Task:
    model = GPT(vocabulary=1024, length=128, width=256, layers=4, heads=4, mean=True)
    return Task(model, torch.randint(1024, (batch, 128)), torch.randint(1024, (batch,)))


def _gpt2_task(batch: int) -> Task:
    """GPT-2 small, without dropout and with a head of its own."""
    size, length = 50257, 1024
    model = GPT(size, length, width=768, layers=12, heads=12, mean=False)
    return Task(model, *torch.randint(size, (2, batch, length)))


def _resnet_task(batch: int) -> Task:
    model = resnet18((64, 128, 256, 512), classes=1000)
    return Task(model, torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


TASKS: dict[str, tuple[Callable[[int], Task], int]] = {
    "MLP": (_mlp_task, 256),
    "CNN": (_cnn_task, 64),
    "GPT": (_gpt_task, 16),
    "GPT-2": (_gpt2_task, 8),
    "ResNet-18": (_resnet_task, 128),
}
"""How to make each task, and the size of its batch."""

ON = {"cpu": ("MLP", "CNN", "GPT"), "cuda": ("GPT-2", "ResNet-18", "MLP", "CNN", "GPT")}
"""The tasks that are of a size for a device."""


def make(
    name: str,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A task with the same weights and examples every time.

    Args:
        name: One of `TASKS`.
        batch: Size of the batch, if not the task's own.
        device: Device of model and batch.
        dtype: Dtype of parameters and inputs.
    """
    build, usual = TASKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        task = build(usual if batch is None else batch)
    x = task.x.to(device, dtype) if task.x.is_floating_point() else task.x.to(device)
    return Task(task.model.to(device, dtype), x, task.y.to(device))


def coordinates(parameters: Sequence[Tensor]) -> Tensor:
    """Some coordinates of the whole gradient, for checks of rules by coordinate."""
    size = sum(p.numel() for p in parameters)
    return torch.linspace(0, size - 1, min(size, 4096), dtype=torch.float64).long()


def gradient_at(some: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The gradient there, from those of all parameters."""
    starts = torch.tensor([0, *(g.numel() for g in gradients)]).cumsum(0)
    parts = torch.bucketize(some, starts[1:], right=True)
    places = ((some[parts == i] - starts[i]).to(g.device) for i, g in enumerate(gradients))
    return torch.cat([g.flatten()[at] for g, at in zip(gradients, places, strict=True)])
