"""Convolutions in two dimensions as plain torch does them, shared by the ops on them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bench.ops.ways import Shape, Source, widen

NAMES = "B I O size kernel stride padding dilation groups"


def window(shape: Shape) -> dict[str, Any]:
    """The arguments that all ops on convolutions have."""
    square = {"kernel_size": "kernel", "stride": "stride", "padding": "padding"}
    options = {name: [shape[key]] * 2 for name, key in square.items()}
    return {**options, "dilation": [shape["dilation"]] * 2, "groups": shape["groups"]}


def factors(shape: Shape, batch: int, random: Source) -> tuple[Tensor, Tensor]:
    """Layer input and output gradient."""
    reach = shape["dilation"] * (shape["kernel"] - 1)
    out = (shape["size"] + 2 * shape["padding"] - reach - 1) // shape["stride"] + 1
    x = random.normal(batch, shape["I"], shape["size"], shape["size"])
    return x, random.normal(batch, shape["O"], out, out)


def weight_shape(x: Tensor, g: Tensor, kernel_size: Sequence[int], groups: int) -> tuple[int, ...]:
    return g.shape[1], x.shape[1] // groups, *kernel_size


def weighted_sum(x: Tensor, g: Tensor, kernel_size: Sequence[int], **options: Any) -> Tensor:
    """The ordinary weight gradient."""
    shape = weight_shape(x, g, kernel_size, options["groups"])
    return conv2d_weight(x, shape, g, **options)


def vmapped(x: Tensor, g: Tensor, kernel_size: Sequence[int], **options: Any) -> Tensor:
    """Gradients `[B, O, I / groups, K, K]`, by one convolution with the batch in the groups."""

    def one(x: Tensor, g: Tensor) -> Tensor:
        return weighted_sum(x[None], g[None], kernel_size, **options)

    return torch.func.vmap(one)(widen(x), widen(g))


def as_linear(
    x: Tensor, g: Tensor, kernel_size: Sequence[int], *, groups: int, **window: Any
) -> tuple[Tensor, Tensor]:
    """Patches `[B groups, T, I / groups K K]` and output gradients `[B groups, T, O / groups]`."""
    x, g = widen(x), widen(g)
    positions = g.shape[2] * g.shape[3]
    pointwise = [*kernel_size, *window["stride"], *window["padding"]] == [1, 1, 1, 1, 0, 0]
    patches = x if pointwise else F.unfold(x, kernel_size, **window)
    by_group = len(x) * groups
    return patches.reshape(by_group, -1, positions).mT, g.reshape(by_group, -1, positions).mT


def unfolded(x: Tensor, g: Tensor, kernel_size: Sequence[int], **options: Any) -> Tensor:
    """Gradients `[B, O, I / groups, K, K]`, by batched products with all patches."""
    patches, grads = as_linear(x, g, kernel_size, **options)
    shape = weight_shape(x, g, kernel_size, options["groups"])
    return torch.bmm(grads.mT, patches).reshape(len(x), *shape)


def gradient_elements(x: Tensor, g: Tensor, kernel_size: Sequence[int], groups: int) -> int:
    o, i, k1, k2 = weight_shape(x, g, kernel_size, groups)
    return o * i * k1 * k2


def patch_elements(x: Tensor, g: Tensor, kernel_size: Sequence[int]) -> int:
    return x.shape[0] * x.shape[1] * g.shape[2] * g.shape[3] * kernel_size[0] * kernel_size[1]
