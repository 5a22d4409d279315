"""Uses of a tensor that is made of parameters, as uses of these."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pycoherence.sites._joint import of_rows
from pycoherence.sites._site import FactoredSite, Site
from pycoherence.sites._strided import Region, holds_each_once
from pycoherence.sites.linear import LinearSite
from pycoherence.sites.parts import Part, PartsSite
from pycoherence.sites.shifted import ShiftedSite


def made_of(site: Site, source: Tensor, leaves: Sequence[Tensor]) -> list[Site]:
    """The sites of the parameters that a tensor was made of, in no example's particular way.

    A view of one parameter leaves factors factors, and so does a parameter that is multiplied with
    or divided by a number, even one that is made of it. Anything else takes the gradients
    `[B, *shape]` back through the graph of the tensor.

    Args:
        site: Site of the tensor.
        source: The tensor, with its graph.
        leaves: The parameters.
    """
    if len(leaves) == 1:
        found = _of_one(site, source, leaves[0])
        if found is not None:
            return [found]
    return _through_graph(site, source, source.dtype, leaves)


def made_of_edge(
    site: Site, edge: GradientEdge, dtype: torch.dtype, leaves: Sequence[Tensor]
) -> list[Site]:
    """The sites that `made_of` gives, of a tensor that is told by where its graph ends."""
    return _through_graph(site, edge, dtype, leaves)


def _through_graph(
    site: Site, source: Tensor | GradientEdge, dtype: torch.dtype, leaves: Sequence[Tensor]
) -> list[Site]:
    """Take the gradients `[B, *shape]` back through the graph of a tensor."""
    rows = site.rows()
    rows = rows if rows.is_complex() else rows.to(dtype)
    if not len(rows):
        return [of_rows(leaf.new_zeros(0, *leaf.shape)) for leaf in leaves]
    grads = _gradients(source, leaves, rows)
    return [
        of_rows(leaf.new_zeros(len(rows), *leaf.shape) if grad is None else grad)
        for grad, leaf in zip(grads, leaves, strict=True)
    ]


def _gradients(
    source: Tensor | GradientEdge, leaves: Sequence[Tensor], rows: Tensor
) -> Sequence[Tensor | None]:
    """The gradients `[B, *shape]` of each parameter, or `None`, from those of what it was made."""
    options = {"retain_graph": True, "allow_unused": True}
    with torch.enable_grad():
        try:
            return torch.autograd.grad(source, leaves, rows, is_grads_batched=True, **options)
        except RuntimeError:
            # A function of the graph takes no batch of gradients; what else is wrong shows again.
            each = [torch.autograd.grad(source, leaves, row, **options) for row in rows]
    of_leaves = zip(*each, strict=True)
    return [None if some[0] is None else torch.stack(list(some)) for some in of_leaves]


def _of_one(site: Site, source: Tensor, leaf: Tensor) -> Site | None:
    """The site of the only parameter, if it has factors of that of the tensor."""
    if source is leaf:
        return site
    return _within(site, source, leaf) or _scaled(site, source, leaf)


def _within(site: Site, source: Tensor, leaf: Tensor) -> Site | None:
    """The site of a parameter, from that of a view of it."""
    if not isinstance(site, FactoredSite) or not _is_view(source, leaf):
        return None
    site, region = site.reshaped(source.shape), Region.of(source, leaf)
    if isinstance(site, LinearSite) and site.shape is None and _has_columns(region):
        site, region = site.transposed(), region.transposed
    if region.offset < 0 or region.end > leaf.numel():
        return None
    if region.is_dense and region.numel == leaf.numel():
        return site.reshaped(leaf.shape)
    if not holds_each_once(region):
        return None
    return PartsSite((Part(site, *region),), tuple(leaf.shape))


def _is_view(source: Tensor, leaf: Tensor) -> bool:
    """Whether the elements of a tensor are some of a parameter's, and nothing else."""
    if source.dtype != leaf.dtype or not leaf.is_contiguous():
        return False
    # Not by address, which is zero for all tensors without data.
    one, two = (x.untyped_storage()._cdata for x in (source, leaf))
    if one != two or source.is_neg() != leaf.is_neg():
        return False
    # A function of the user's may give a view of its argument, and any gradient.
    node = source.grad_fn
    while node is not None and len(node.next_functions) == 1:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return False
        node = node.next_functions[0][0]
    return node is not None and getattr(node, "variable", None) is leaf


def _has_columns(region: Region) -> bool:
    """Whether a matrix lies in memory column by column."""
    (rows, columns), (down, right) = region.size, region.stride
    return rows > 1 and columns > 1 and down < right


class _Product(NamedTuple):
    """A tensor that was made of another and of a number, `source = tensor * scale`.

    Attributes:
        tensor: The other one.
        number: The factor, or the divisor.
        edge: The end of the graph of the number; `None` for a constant.
        divided: Whether it was divided by.
    """

    tensor: Tensor
    number: Tensor
    edge: GradientEdge | None
    divided: bool

    @property
    def scale(self) -> Tensor:
        """The factor of the tensor, in float64."""
        number = self.number.detach().reshape(()).double()
        return number.reciprocal() if self.divided else number

    @property
    def slope(self) -> Tensor | float:
        """The derivative of `scale` with respect to the number."""
        return -self.scale.square() if self.divided else 1.0


def _scaled(site: Site, source: Tensor, leaf: Tensor) -> Site | None:
    """The site of a parameter, from that of its product with a number.

    The number may be made of the parameter, as a spectral norm is. Then each gradient is moved
    along the derivative of the number, by its dot product with the tensor.
    """
    product = _product(source)
    if product is None:
        return None
    direction = None if product.edge is None else _gradient(product.edge, product.number, leaf)
    if direction is None:
        if not isinstance(site, FactoredSite):
            return None
        return _of_one(site.scaled(product.scale.to(site.g.device)), product.tensor, leaf)
    inner = _of_one(site, product.tensor, leaf)
    if inner is None:
        return None
    dots = site.reduce(("dots",), direction=product.tensor.detach()).dots
    assert dots is not None
    return ShiftedSite(inner, product.scale, dots.double() * product.slope, direction)


def _product(source: Tensor) -> _Product | None:
    """How a tensor was made, if it was by one multiplication with a number."""
    node: Any = source.grad_fn
    if node is None or node.name() not in ("MulBackward0", "DivBackward0"):
        return None
    divided = node.name() == "DivBackward0"
    operands = [_operand(node, 0, "_saved_self"), _operand(node, 1, "_saved_other")]
    for i in (1,) if divided else (1, 0):
        tensor, number = operands[1 - i], operands[i]
        if tensor is None or number is None or number.numel() != 1:
            continue
        if tensor.shape != source.shape or tensor.dtype != source.dtype:
            continue
        function, output = node.next_functions[i]
        edge = None if function is None else GradientEdge(function, output)
        return _Product(tensor, number, edge, divided)
    return None


def _operand(node: Any, i: int, saved: str) -> Tensor | None:
    """The argument of a function, if its graph tells."""
    # The user may have packed a saved tensor, which is no parameter when it is unpacked.
    variable = getattr(node.next_functions[i][0], "variable", None)
    return getattr(node, saved) if variable is None else variable


def _gradient(edge: GradientEdge, number: Tensor, leaf: Tensor) -> Tensor | None:
    """The gradient of a number with respect to a parameter, if it is made of it."""
    with torch.enable_grad():
        (found,) = torch.autograd.grad(
            [edge], [leaf], [torch.ones_like(number)], retain_graph=True, allow_unused=True
        )
    return found
