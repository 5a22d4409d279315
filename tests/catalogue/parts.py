"""Parts of models that use their parameters in unusual ways."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

B, T = 4, 3


class Scale(nn.Module):
    """A layer of the user's own."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._apply_scale = apply
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_scale(x, self.scale)


class Native(torch.autograd.Function):
    """Doubles a tensor where no mode sees it, as native code does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


class Square(torch.autograd.Function):
    """A function that torch function modes see the inside of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def features() -> Tensor:
    return torch.randn(B, 6)


def sequence() -> Tensor:
    return torch.randn(B, T, 6)


def ids() -> Tensor:
    return torch.randint(5, (B, T))


def after_linear(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer))


def custom(apply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 6), Scale(apply))


def embedding(**options) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(5, 6, **options), nn.Linear(6, 6))
