"""A weight that is convolved with the layer input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.conv_reduce import materialise
from pycoherence.sites._site import order, reduce, shaped


@dataclass(frozen=True)
class ConvSite:
    """The gradient of a convolution weight `[O, I / groups, *kernel_size]`.

    Attributes:
        x: Layer input, `[B, I, *S]`.
        g: Gradient with respect to the layer output, `[B, O, *S_out]`.
        kernel_size: One number for each spatial dimension; so are the other options.
        stride: Step between patches.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel points.
        groups: Groups of channels.
        shape: Shape of the weight if it is not `[O, I / groups, *kernel_size]`.
    """

    x: Tensor
    g: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    shape: Sequence[int] | None = None

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        if self.shape is not None and direction is not None:
            direction = direction.reshape(*self.shape[:2], *self.kernel_size)
        out = reduce("conv_reduce", want, *self._head(), coef=coef, direction=direction)
        return out if self.shape is None else shaped(out, self.shape)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`."""
        out = order("conv_order", len(self.g), *self._head(), rule=rule, k=k, drop=drop)
        return out if self.shape is None else out.view(tuple(self.shape))

    def grouped(self, n: int) -> "ConvSite":
        """As `Site.grouped`: the examples are one more spatial dimension, with a kernel of one."""
        shape = self.shape or (self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel_size)
        return replace(
            self,
            x=_stacked(self.x, n),
            g=_stacked(self.g, n),
            kernel_size=(1, *self.kernel_size),
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            dilation=(1, *self.dilation),
            shape=shape,
        )

    def rows(self) -> Tensor:
        """As `Site.rows`."""
        rows = materialise(*self._head()).joined()
        return rows if self.shape is None else rows.view(len(rows), *self.shape)

    def with_others(self, others: Sequence["ConvSite"]) -> "ConvSite | None":
        """As `Site.with_others`: none, since images of several sizes have no common factors."""
        return None

    def _head(self) -> tuple[Any, ...]:
        options = (self.kernel_size, self.stride, self.padding, self.dilation)
        return (self.x, self.g, *map(list, options), self.groups)


def _stacked(x: Tensor, n: int) -> Tensor:
    """`[B, C, *S]` to `[B / n, C, n, *S]`, with the channels last in memory, as the kernels are."""
    return x.movedim(1, -1).contiguous().unflatten(0, (-1, n)).movedim(-1, 1)
