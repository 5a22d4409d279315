"""The truth: one example at a time through autograd, in float64. Never clever."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]


def in_float64(value: Any) -> Any:
    """The same tensors, the floating ones in float64."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    return tuple(in_float64(item) for item in value)


def example(batch: tuple[Tensor, ...], b: int, rows: int) -> tuple[Tensor, ...]:
    """Batch of the one example b, which has several rows if it is a group."""
    # Contiguous, as the backward of torch's group_norm crashes on a channels_last leaf.
    return tuple(item[b * rows : (b + 1) * rows].contiguous() for item in batch)


def per_example_gradients(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Tensor, ...], group_size: int = 1
) -> dict[str, Tensor]:
    """Gradient of each example's own loss, `[B, *shape]` for every trainable parameter.

    `loss_fn(model, batch)` may join the examples by a mean or a sum: of one they are the same. Of
    a group, it is what joins its rows.
    """
    model, batch = copy.deepcopy(model).double(), in_float64(batch)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size = len(batch[0]) // group_size
    gradients = {
        name: torch.zeros(size, *p.shape, dtype=torch.float64) for name, p in parameters.items()
    }
    for b in range(size):
        loss = loss_fn(model, example(batch, b, group_size))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[name][b] = gradient
    return gradients


def flat(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as rows `[B, P]`, those of a single number too."""
    return {name: g.unsqueeze(-1).flatten(1) for name, g in gradients.items()}


def sq_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squared norms, `[B]` for every parameter."""
    return {name: rows.square().sum(1) for name, rows in flat(gradients).items()}


def joined(gradients: dict[str, Tensor]) -> Tensor:
    """The gradients of all parameters, one row `[P]` for each example."""
    return torch.cat([*flat(gradients).values()], 1)


def m_coherence(gradients: dict[str, Tensor]) -> float:
    """How many examples an average one helps, of all parameters together."""
    rows = joined(gradients)
    return (rows.sum(0).square().sum() / rows.square().sum()).item()
