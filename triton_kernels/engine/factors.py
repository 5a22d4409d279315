"""The factors of per-example gradients as the tile engine takes them, and its launch."""

from collections.abc import Set
from math import prod
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.triton_kernels.engine.kernel import reduce_tiles
from pycoherence.triton_kernels.engine.tiles import (
    LONG,
    Tile,
    kind_of,
    parts_of,
    seconds_of,
    tile_for,
)
from pycoherence.triton_kernels.launch.device import device_of, launch, precision
from pycoherence.triton_kernels.launch.finish import SumRequest
from pycoherence.triton_kernels.launch.host import cdiv

# Outputs that share an input channel: with more of them a tile of the engine is worth it.
_FEW = 4


class Factors(NamedTuple):
    """The gradients `G_b = sum_p g_bp patch_p(x_b)^T` of a convolution's weight, as factors.

    Attributes:
        x: Input, `[B, I, *S]`, any strides.
        g: Output gradient, `[B, O, T]`.
        out_size: The dimensions of `T`, `S_out`.
        kernel: Size of the kernel, one number for each dimension, as in the next three.
        stride: Steps of the kernel.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel's points.
        groups: Groups of channels.
        behind: How many zeros lie behind the outputs of a position, and behind the inputs of a
            linear layer; they may be read.
    """

    x: Tensor
    g: Tensor
    out_size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    behind: tuple[int, int] = (0, 0)

    @classmethod
    def of_linear(cls, x: Tensor, g: Tensor) -> "Factors":
        """Those of a linear layer, `[B, T, I]` and `[B, T, O]`: a kernel of one."""
        return cls(x.mT, g.mT, (x.shape[1],), (1,), (1,), (0,), (1,), 1)

    @classmethod
    def of_conv(cls, x: Tensor, g: Tensor, *options: Any) -> "Factors":
        """Those of a convolution, from the arguments of its op, with neighbours in memory.

        Tensors that lie otherwise are copied to channels last, unless `narrow`. A kernel of one
        sees positions in a row.
        """
        *window, groups = options
        kernel, stride, padding, dilation = map(tuple, window)
        flat, out_size = g.flatten(2), tuple(g.shape[2:])
        factors = cls(x, flat, out_size, kernel, stride, padding, dilation, groups)
        return factors if factors.narrow else factors._vectorised()

    def _vectorised(self) -> "Factors":
        """The same as the engine reads them best."""
        x, g = self.x, _vectorised(self.g)
        if set(self.kernel) == {1} == set(self.stride) and set(self.padding) == {0}:
            one = (1,), (1,), (0,), (1,)
            return Factors(_vectorised(x.flatten(2)), g, (g.shape[2],), *one, self.groups)
        return self._replace(x=_channels_last(x), g=g)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the parameter, `[O, I / groups * taps]`."""
        return self.g.shape[1], self.x.shape[1] // self.groups * prod(self.kernel)

    @property
    def narrow(self) -> bool:
        """Whether an output has one input channel and few neighbours that share it.

        A tile of the engine would be all but empty. Such gradients are small beside the factors,
        and are made as rows.
        """
        return self.x.shape[1] == self.groups and self.g.shape[1] <= _FEW * self.groups

    @property
    def described(self) -> bool:
        """Whether the GPU can copy the factors by descriptors, which Hopper's kind has.

        They are rows of neighbours in half precision that begin at multiples of 16 bytes, of a
        linear layer or a kernel of one.
        """
        x, g = self.x, self.g
        one = set(self.kernel) == {1} == set(self.stride) and set(self.padding) == {0}
        if not one or x.dim() > 3 or self.groups > 1 or x.itemsize != 2:
            return False
        return device_of(x).capability == 90 and all(map(_in_rows, (x, g)))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to add up."""
        return not self.x.numel() or not self.g.numel()


def _in_rows(x: Tensor) -> bool:
    batch, channel, position = x.stride()
    whole = position % 8 == 0 and x.data_ptr() % 16 == 0
    # A descriptor's strides are multiples of each other.
    nested = position >= x.shape[1] and batch >= position and batch % position == 0
    return channel == 1 and whole and nested


def _descriptor(x: Tensor, positions: int, channels: int) -> TensorDescriptor:
    """A descriptor of `[B, C, T]` as `[B, T, C]`, in blocks of one example."""
    batch, channel, position = x.stride()
    size = [x.shape[0], x.shape[2], x.shape[1]]
    return TensorDescriptor(x, size, [batch, position, channel], [1, positions, channels])


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _vectorised(x: Tensor) -> Tensor:
    """`[B, C, T]`, with 16 bytes lying together wherever that is possible."""
    whole = x.stride(2) == 1 and x.stride(1) * x.itemsize % 16 == 0
    return x if whole else _channels_last(x)


def reduce(
    factors: Factors,
    wanted: frozenset[str],
    coef: Tensor | None = None,
    direction: Tensor | None = None,
    *,
    request: SumRequest | None = None,
    parts: int | None = None,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    """Reductions of gradients in one pass over their factors.

    Args:
        factors: Not empty.
        wanted: From `sq_norms`, `dots`, `weighted_sum`, `second_moment`, `sign_sum`, `gradients`.
        coef: `[B]`, the weights of `weighted_sum`; ones if `None`.
        direction: Parameter-shaped, what `dots` are taken with.
        request: How the weighted sum is wanted, if there is one part.
        parts: Among how many programs the examples are divided; chosen if `None`.
        tile: Tile of each program; chosen if `None`.

    Returns:
        By name, in accumulation dtype unless the `request` has another: `[tiles, B]` of norms and
        dots, `[parts, O, K]` of sums, to be added up over their first dimension; `[B, O, K]` of
        gradients.
    """
    x, g = factors.x, factors.g
    batch, (o, k) = len(x), factors.shape
    acc, rows = accumulate_dtype(x.dtype), o // factors.groups
    tile = tile or tile_of(factors, wanted)
    tiles = factors.groups * cdiv(rows, tile.o) * cdiv(k, tile.k)
    if parts is None:
        sums = len(wanted & _SUMS)
        sum_bytes = o * k * acc.itemsize * sums
        room = workspace(x.device) // max(1, sum_bytes) if sums else batch
        each = seconds_of(kind_of(x.dtype, precision(x.dtype)), tile, g.shape[2])
        parts = parts_of(device_of(x), batch, tiles, min(room, 65535), each, sum_bytes)
    request = request if parts == 1 and request is not None else SumRequest()
    out = {
        name: request.empty(x, size) if name == "weighted_sum" else x.new_empty(size, dtype=acc)
        for name, size in {
            "sq_norms": (tiles, batch),
            "dots": (tiles, batch),
            "weighted_sum": (parts, o, k),
            "second_moment": (parts, o, k),
            "sign_sum": (parts, o, k),
            "gradients": (batch, o, k),
        }.items()
        if name in wanted
    }
    norms = request.norms_of(x, tiles) if "weighted_sum" in wanted else None
    described = factors.described
    launch(
        reduce_tiles,
        (tiles, parts),
        _descriptor(x, tile.t, tile.k) if described else x,
        _descriptor(g, tile.t, tile.o) if described else g,
        None if coef is None else coef.to(acc).contiguous(),
        None if direction is None else direction.to(acc).contiguous(),
        *map(out.get, ("sq_norms", "dots", "weighted_sum")),
        norms,
        *map(out.get, ("second_moment", "sign_sum", "gradients")),
        batch,
        x.shape[1] // factors.groups,
        rows,
        g.shape[2],
        rows + factors.behind[0],
        k + factors.behind[1],
        *_layout(factors),
        KERNEL=factors.kernel,
        STRIDE=factors.stride,
        PADDING=factors.padding,
        DILATION=factors.dilation,
        DIMS=len(factors.kernel),
        TAPS=prod(factors.kernel),
        COEF=coef is not None,
        DESCRIBED=described,
        EDGES=rows % tile.o > 0 or k % tile.k > 0,
        BLOCK_O=tile.o,
        BLOCK_K=tile.k,
        BLOCK_T=tile.t,
        CHUNK=LONG // tile.t if g.shape[2] > LONG else 0,
        OFFSET=tl.int32 if max(reach(x), reach(g), o * k) < 2**31 else tl.int64,
        ACC=tl.float64 if acc == torch.float64 else tl.float32,
        PRECISION=precision(x.dtype),
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


_SUMS = {"weighted_sum", "second_moment", "sign_sum"}


def tile_of(factors: Factors, wanted: Set[str]) -> Tile:
    """The tile that fits the registers, by what is kept in them beside the product."""
    x, (o, k), long = factors.x, factors.shape, factors.g.shape[2] > LONG
    channels, rows = x.shape[1] // factors.groups, o // factors.groups
    at_end = "dots" in wanted or "gradients" in wanted  # addresses, and what is read there
    beside = len(wanted & _SUMS) + long + 2 * at_end
    # Channels that cannot be read in vectors take an address and a mask each.
    scattered = prod(factors.kernel) > 1 and channels * x.itemsize % 16 != 0
    device, how = device_of(x), precision(x.dtype)
    tile = tile_for(device, x.dtype, how, rows, k, beside + scattered, factors.described)
    return tile._replace(t=max(16, tile.t // 2)) if scattered else tile


def _layout(factors: Factors) -> tuple[tuple[int, ...] | int, ...]:
    """Sizes and strides, in the order of the kernel's arguments."""
    x, g = factors.x, factors.g
    x_batch, x_channel, *x_space = x.stride()
    return (
        *(tuple(x.shape[2:]), factors.out_size),
        *(x_batch, x_channel, tuple(x_space)),
        *g.stride(),
    )


def reach(x: Tensor) -> int:
    """How far the numbers of one example lie apart, padding and blocks past the edge included."""
    return sum(
        (size + 2048) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)
    )
