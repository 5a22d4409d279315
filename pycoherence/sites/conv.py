"""A weight that is convolved with the layer input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from pycoherence.ops.conv_reduce import materialise
from pycoherence.ops.core.chunks import Chunks
from pycoherence.sites._site import FactoredSite, Side


class Window(NamedTuple):
    """The options of a convolution, in the order in which the ops and `ConvSite` take them.

    Attributes:
        kernel_size: One number for each spatial dimension; so are the next three.
        stride: Step between patches.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel points.
        groups: Groups of channels.
    """

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def beside_examples(self) -> "Window":
        """The same with one more spatial dimension, the first, whose positions never mix."""
        return Window(
            kernel_size=(1, *self.kernel_size),
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            dilation=(1, *self.dilation),
            groups=self.groups,
        )


@dataclass(frozen=True)
class ConvSite(FactoredSite):
    """The gradient of a convolution weight `[O, I / groups, *kernel_size]`.

    Attributes:
        x: Layer input, `[B, I, *S]`.
        g: Gradient with respect to the layer output, `[B, O, *S_out]`.
        kernel_size: See `Window`; so are the next four.
        stride: Step between patches.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel points.
        groups: Groups of channels.
        shape: Shape of the weight if it is not `[O, I / groups, *kernel_size]`.
    """

    family: ClassVar[str] = "conv"

    x: Tensor
    g: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    shape: Sequence[int] | None = None

    @property
    def op_shape(self) -> tuple[int, ...]:
        """See `FactoredSite.op_shape`."""
        return self.g.shape[1], self.x.shape[1] // self.groups, *self.kernel_size

    @property
    def window(self) -> Window:
        """The options of the convolution."""
        return Window(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def head(self) -> tuple[Any, ...]:
        """See `FactoredSite.head`."""
        *options, groups = self.window
        return (self.x, self.g, *map(list, options), groups)

    def chunks(self) -> Chunks:
        """See `FactoredSite.chunks`."""
        return materialise(*self.head())

    def grouped(self, n: int) -> "ConvSite":
        """See `Site.grouped`: the examples are one more spatial dimension, with a kernel of one."""
        x, g = _stacked(self.x, n), _stacked(self.g, n)
        return ConvSite(x, g, *self.window.beside_examples(), self.parameter_shape)

    def with_others(self, others: Sequence["ConvSite"]) -> "ConvSite | None":
        """See `Site.with_others`: none, since images of several sizes have no common factors."""
        return None

    def sides(self) -> tuple[Side, ...]:
        """See `FactoredSite.sides`; groups of channels stay together."""
        (rows, columns, *_), n = self.op_shape, self.groups
        if n > 1:
            return (Side(0, n, rows // n, split={"g": (1, rows // n), "x": (1, columns)}),)
        return (
            Side(0, rows, 1, split={"g": (1, 1)}, whole=("x",)),
            Side(1, columns, 1, split={"x": (1, 1)}, whole=("g",)),
        )

    def places(self) -> tuple[int, ...]:
        """See `FactoredSite.places`."""
        return *self.x.shape[2:], *self.g.shape[2:]

    def options(self) -> tuple[Any, ...]:
        """See `FactoredSite.options`."""
        *options, groups = self.window
        return (*map(tuple, options), groups)

    def cut(self, side: Side, factors: Mapping[str, Tensor], units: int) -> "ConvSite":
        """See `FactoredSite.cut`."""
        return replace(self, groups=max(1, units) if self.groups > 1 else 1, **factors)


def _stacked(x: Tensor, n: int) -> Tensor:
    """`[B, C, *S]` to `[B / n, C, n, *S]`, with the channels last in memory, as the kernels are."""
    return x.movedim(1, -1).contiguous().unflatten(0, (len(x) // n, n)).movedim(-1, 1)
