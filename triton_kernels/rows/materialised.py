"""Gradients of some rows of a parameter at a time, materialised, and their products."""

from collections.abc import Iterator

from torch import Tensor

from pycoherence.ops.core.chunks import mirrored, row_slices
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ops.core.workspace import workspace
from pycoherence.ops.family.gram import gram_fake
from pycoherence.triton_kernels.engine.factors import Factors, reduce
from pycoherence.triton_kernels.rows.depthwise import gradients_in_parts

# A product of matrices adds up each number in one go: longer rows would lose digits.
PIECE = 2**15

# Slices of this number of rows start where their neighbours do, seen in blocks of 16 bytes.
_ALIGNED = 16


def rows_of(factors: Factors, part: slice) -> Factors:
    """The factors of some rows of the parameter: within a group of channels, or of whole groups."""
    rows = factors.shape[0] // factors.groups
    inputs = factors.x.shape[1] // factors.groups
    first, last = part.start // rows, -(-part.stop // rows)
    seen = factors.x[:, first * inputs : last * inputs]
    return factors._replace(x=seen, g=factors.g[:, part], groups=last - first, behind=(0, 0))


def row_parts(factors: Factors, size: int) -> Iterator[slice]:
    """Slices of rows of the parameter that fit the workspace, with at least one row.

    Args:
        factors: Not empty.
        size: Bytes that each number of the parameter takes.
    """
    rows, columns = factors.shape
    step = max(1, workspace(factors.x.device) // (columns * size))
    if step > _ALIGNED:
        step -= step % _ALIGNED
    return row_slices(rows, rows // factors.groups, step)


def materialise(factors: Factors) -> Tensor:
    """The gradients themselves, `[B, O, K]`."""
    shape = len(factors.x), *factors.shape
    if factors.empty:
        return factors.x.new_zeros(shape, dtype=accumulate_dtype(factors.x.dtype))
    if factors.narrow:
        return added(gradients_in_parts(factors), 1).view(shape)
    parts = min(len(factors.x), 65535)
    return reduce(factors, frozenset({"gradients"}), parts=parts)["gradients"]


def added(partial: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, without a copy where there is one term."""
    return partial.squeeze(dim) if partial.shape[dim] == 1 else partial.sum(dim)


def gram_of_tiles(one: Factors, two: Factors | None = None) -> Tensor:
    """All dot products of the gradients of two batches, or of a batch with itself.

    The rows of the parameter are materialised in parts, for all examples, that fit the workspace
    or have one row, and the products of the parts are added up.

    Args:
        one: Factors of the first batch.
        two: Those of the second batch; the first one itself if `None`.

    Returns:
        `[B1, B2]` in accumulation dtype, exactly symmetric for a batch with itself.
    """
    out = gram_fake(one.g, None if two is None else two.g).zero_()
    if one.empty or (two is not None and two.empty):
        return out
    examples = len(one.x) + (0 if two is None else len(two.x))
    for part in row_parts(one, examples * out.itemsize):
        left = materialise(rows_of(one, part)).flatten(1)
        right = left if two is None else materialise(rows_of(two, part)).flatten(1)
        add_dots(out, left, right)
    return out if two is not None else mirrored(out)


def add_dots(out: Tensor, left: Tensor, right: Tensor, piece: int = PIECE) -> None:
    """Add the dot products of the rows of `[B1, P]` and `[B2, P]` to `[B1, B2]`."""
    for a, b in zip(left.split(piece, 1), right.split(piece, 1), strict=True):
        out.addmm_(a, b.mT)
