"""Statistics of all pairs of gradients, from the Gram matrix of their dot products."""

from typing import Literal

import torch
from torch import Tensor

from pycoherence.metrics._arguments import check_devices, to_tensor
from pycoherence.metrics._docs import documented
from pycoherence.metrics._pairs import divide_by_norms, off_diagonal_mean, similarity, to_gram


@documented()
def gram_sums(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two sums that the metrics of a whole sample take, S and Q, from its Gram matrix.

    .. math::
        S = \sum_{i,j} g_i \cdot g_j = \Bigl\lVert \sum_i g_i \Bigr\rVert^2, \qquad
        Q = \sum_i g_i \cdot g_i

    `m_coherence(*gram_sums(gram))` and `alpha(*gram_sums(gram), n=len(gram))` then are the
    coherence; a block of the Gram matrix gives that of a part of the sample.

    Range: both in [0, inf), up to rounding.

    Scaling: with the square of the gradients.

    Returns:
        `sum_sq_norm` and `total_sq_norm`, both `[]`, float32 or better.

    Cost: O(B^2).

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217.

    Example:
        >>> gram_sums(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        (tensor(6.), tensor(4.))
    """
    square = to_gram("gram_sums", gram)
    return square.sum(), square.diagonal().sum()


@documented()
def cosines(gram: Tensor, sq_norms: tuple[Tensor, Tensor] | None = None) -> Tensor:
    r"""The cosine of the angle between the gradients of each pair.

    .. math::
        \cos(g_i, g_j) = \frac{g_i \cdot g_j}{\lVert g_i \rVert \, \lVert g_j \rVert}

    Range: [-1, 1], up to rounding; nan where a gradient of the pair vanishes.

    Scaling: unchanged when any gradient is multiplied by a positive constant.

    Args:
        gram: Dot products of the gradients with each other, `[B, B]`; or, with `sq_norms`,
            those of one sample with those of another, `[B1, B2]`.
        sq_norms: Squared norms of the gradients of the rows, `[B1]`, and of the columns,
            `[B2]`; the diagonal of `gram` unless given.

    Returns:
        `[B, B]` or `[B1, B2]`, float32 or better.

    Cost: O(B1 B2).

    Source: Fort et al. 2019, arXiv:1901.09491.

    Example:
        >>> cosines(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    if sq_norms is None:
        return similarity("cosines", gram, "cos", ("cos",))
    cross = to_tensor("cosines", "gram", gram)
    rows, columns = (to_tensor("cosines", "sq_norms", each) for each in sq_norms)
    if cross.dim() != 2 or rows.shape != cross.shape[:1] or columns.shape != cross.shape[1:]:
        shapes = [list(each.shape) for each in (cross, rows, columns)]
        raise ValueError(
            f"cosines: expected gram [B1, B2] and sq_norms [B1] and [B2], got shapes {shapes}; "
            "pass the squared norms of the gradients of the rows and of the columns"
        )
    check_devices("cosines", cross, rows, columns)
    return divide_by_norms(cross, rows.sqrt(), columns.sqrt())


@documented(kind='`"cos"` or `"dot"`.')
def confusion(gram: Tensor, kind: Literal["cos", "dot"] = "cos") -> Tensor:
    r"""Gradient confusion: how strongly the worst pair of gradients conflicts.

    .. math::
        \hat\eta = -\min_{i \ne j} \cos(g_i, g_j)
        \qquad\text{or}\qquad
        \eta = -\min_{i \ne j} \, g_i \cdot g_j

    The dot products are those of the theory, whose bound asks for `eta >= 0` (clamp a negative
    one); the cosines are what the source's experiments measure, over pairs of mini-batches. An
    extreme of noisy numbers: it grows with the number of pairs, so compare samples of one size.

    Range: [-1, 1] for cosines, 0 when the gradients are orthogonal, 1 when two are opposite,
    negative when every pair agrees; any real number for dot products. nan without a pair, and for
    cosines when a gradient vanishes.

    Scaling: cosines are unchanged when any gradient is multiplied by a positive constant; dot
    products go with the square of the gradients.

    Returns:
        `[]`, float32 or better.

    Cost: O(B^2).

    Source: Sankararaman et al. 2020, arXiv:1904.06963.

    Example:
        >>> confusion(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor(0.5000)
    """
    pairs = similarity("confusion", gram, kind, ("cos", "dot"))
    if len(pairs) < 2:
        return pairs.new_full((), torch.nan)
    return -pairs.clone().fill_diagonal_(torch.inf).amin()


@documented()
def disparity(gram: Tensor) -> Tensor:
    r"""Gradient disparity: the mean distance between two gradients.

    .. math::
        \bar D = \frac{1}{B (B - 1)} \sum_{i \ne j} \lVert g_i - g_j \rVert, \qquad
        \lVert g_i - g_j \rVert^2 = g_i \cdot g_i + g_j \cdot g_j - 2 \, g_i \cdot g_j

    The source takes the gradients of five mini-batches of one size. Differences of nearly equal
    gradients cancel: pass a float64 Gram matrix where they matter.

    Range: [0, inf); 0 when the gradients are equal, nan without a pair.

    Scaling: with the gradients; those of larger mini-batches are closer to each other.

    Returns:
        `[]`, float32 or better.

    Cost: O(B^2).

    Source: Forouzesh and Thiran 2021, arXiv:2107.06665.

    Example:
        >>> disparity(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        tensor(5.)
    """
    square = to_gram("disparity", gram)
    sq_norms = square.diagonal()
    sq_distances = sq_norms.unsqueeze(1) + sq_norms - 2 * square
    return off_diagonal_mean(sq_distances.clamp(min=0).sqrt())
