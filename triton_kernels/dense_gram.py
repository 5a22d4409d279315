"""Dot products of rows that are there already, by products of matrices."""

from torch import Tensor

from pycoherence.ops.core.chunks import mirrored
from pycoherence.ops.core.workspace import workspace
from pycoherence.ops.family.gram import gram_fake
from pycoherence.triton_kernels.launch.finish import finished
from pycoherence.triton_kernels.matmul.outer_sums import sum_of_products
from pycoherence.triton_kernels.rows.materialised import PIECE, add_dots


def dense_gram(a: Tensor, b: Tensor | None) -> Tensor:
    """The output of `dense_gram`, as its schema says; exactly symmetric for a batch with itself.

    Half precision is multiplied as it lies and added up in float32, as outer products of columns,
    by a kernel whose partial sums fit the workspace. Other dtypes are multiplied by torch, some
    columns at a time, at least 64, so that the copy it may need of them fits the workspace.

    Its errors stay below 1e-5 of the largest number, 1e-12 for float64; with TensorFloat-32
    allowed, of its rounding.
    """
    other = a if b is None else b
    if a.itemsize == 2:
        out = finished(sum_of_products, other.mT, a.mT)
    else:
        out = gram_fake(a, b).zero_()
        room = workspace(a.device) // max(1, (len(a) + len(other)) * a.itemsize)
        add_dots(out, a, other, min(PIECE, max(64, room)))
    return mirrored(out) if b is None else out
