"""A weight that is convolved with the layer input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites._site import order, reduce


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
    """

    x: Tensor
    g: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """As `Site.reduce`."""
        return reduce("conv_reduce", want, *self._head(), coef=coef, direction=direction)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """As `Site.order`."""
        return order("conv_order", len(self.g), *self._head(), rule=rule, k=k, drop=drop)

    def _head(self) -> tuple[Any, ...]:
        options = (self.kernel_size, self.stride, self.padding, self.dilation)
        return (self.x, self.g, *map(list, options), self.groups)
