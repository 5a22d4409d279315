"""A parameter with only some regions in use, each as a tensor of its own."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.sites._joint import joint
from pycoherence.sites._site import PARAMETER_SHAPED, Site, nested
from pycoherence.sites._strided import Region, are_disjoint
from pycoherence.sites.linear import LinearSite


class Part(NamedTuple):
    """The gradients of one region of a parameter.

    The region is `parameter.contiguous().as_strided(size, stride, offset)`.

    Attributes:
        site: Their factors; its parameter has the shape `size`.
        size: Argument of `torch.as_strided`, like the others.
        stride: In elements.
        offset: From the parameter's first element.
    """

    site: Site
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def region(self) -> Region:
        """The place of the part."""
        return Region(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class PartsSite:
    """`G_b` is zero outside of a few regions that have no element in common.

    Nothing of the size `[B, *shape]` is made, but by `rows`.

    Attributes:
        parts: The regions, one or more.
        shape: Shape of the parameter.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """See `Site.reduce`."""
        if direction is not None:
            direction = direction.contiguous()
        found = [
            part.site.reduce(
                want,
                coef=coef,
                direction=None if direction is None else part.region.within(direction),
            )
            for part in self.parts
        ]
        return Reduced(*(self._together(name, found) for name in Reduced._fields))

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """See `Site.order`; where all examples have a zero, every rule gives zero."""
        return self._filled([part.site.order(rule, k, drop) for part in self.parts])

    def by_slices(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Site.by_slices`."""
        return self._filled([part.site.by_slices(function) for part in self.parts])

    def grouped(self, n: int) -> "PartsSite":
        """See `Site.grouped`."""
        return self._with_sites([part.site.grouped(n) for part in self.parts])

    def picked(self, examples: Tensor) -> "PartsSite":
        """See `Site.picked`."""
        return self._with_sites([part.site.picked(examples) for part in self.parts])

    def rows(self) -> Tensor:
        """See `Site.rows`."""
        found = [part.site.rows() for part in self.parts]
        out = found[0].new_zeros(len(found[0]), *self.shape)
        for part, rows in zip(self.parts, found, strict=True):
            part.region.within(out, len(out)).copy_(rows)
        return out

    def with_others(self, others: Sequence["PartsSite"]) -> "PartsSite | None":
        """See `Site.with_others`: none if regions overlap that are not the same."""
        if any(site.shape != self.shape for site in others):
            return None
        uses = defaultdict[Region, list[Site]](list)
        for site in (self, *others):
            for part in site.parts:
                uses[part.region].append(part.site)
        if not are_disjoint(uses):
            return None
        parts = tuple(Part(joint(sites), *region) for region, sites in uses.items())
        return PartsSite(parts, self.shape)

    def as_linear(self) -> LinearSite | None:
        """The same as a weight with zeros around factors, if the parts are blocks of a matrix.

        This is more to compute. It serves sums with gradients of the whole weight, or of blocks
        that overlap.
        """
        columns = self.shape[-1] if self.shape else 1
        blocks = [_around(part, self.shape, columns) for part in self.parts]
        found = [block for block in blocks if block is not None]
        return found[0].with_others(found[1:]) if len(found) == len(blocks) else None

    def tensors(self) -> dict[str, Tensor]:
        """See `Site.tensors`: those of part 0 begin with `0.`, and so on."""
        return {
            f"{i}.{name}": x
            for i, part in enumerate(self.parts)
            for name, x in part.site.tensors().items()
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "PartsSite":
        """See `Site.with_tensors`."""
        return self._with_sites(
            [part.site.with_tensors(nested(tensors, f"{i}.")) for i, part in enumerate(self.parts)]
        )

    def _with_sites(self, sites: Sequence[Site]) -> "PartsSite":
        pairs = zip(self.parts, sites, strict=True)
        return replace(self, parts=tuple(part._replace(site=site) for part, site in pairs))

    def _together(self, name: str, found: Sequence[Reduced]) -> Tensor | None:
        """One output of all parts."""
        outputs: list[Any] = [getattr(one, name) for one in found]
        if outputs[0] is None:
            return None
        if name in PARAMETER_SHAPED:
            return self._filled(outputs)
        total = outputs[0]
        for out in outputs[1:]:
            total = total + out
        return total

    def _filled(self, values: Sequence[Tensor]) -> Tensor:
        """A parameter with the values of its parts, and zeros elsewhere."""
        covered = sum(value.numel() for value in values) == math.prod(self.shape)
        out = values[0].new_empty(self.shape) if covered else values[0].new_zeros(self.shape)
        for part, value in zip(self.parts, values, strict=True):
            part.region.within(out).copy_(value)
        return out


def _around(part: Part, shape: Sequence[int], columns: int) -> LinearSite | None:
    """A block of a parameter that is a matrix of `columns` columns, as a site of the whole."""
    site, region = part.site, part.region
    if not isinstance(site, LinearSite) or len(region.size) != 2 or not columns:
        return None
    if site.parameter_shape != site.op_shape:
        return None
    (height, width), rows = region.size, math.prod(shape) // columns
    row, column = divmod(region.offset, columns)
    in_rows = height == 1 or region.stride[0] == columns
    in_columns = width == 1 or region.stride[1] == 1
    if not (in_rows and in_columns and column + width <= columns and row + height <= rows):
        return None
    x, g = site.head()
    whole = LinearSite(
        F.pad(x, (column, columns - column - width)), F.pad(g, (row, rows - row - height))
    )
    return whole.reshaped(shape)
