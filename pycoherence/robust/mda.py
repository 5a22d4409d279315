"""Minimum diameter averaging."""

from dataclasses import dataclass

from torch import Tensor

from pycoherence.robust._space import GramSpace
from pycoherence.robust._subset_rule import SubsetRule
from pycoherence.robust._subsets import least_diameter


@dataclass(frozen=True)
class MDA(SubsetRule):
    r"""The mean of the `B - f` examples whose largest distance from each other is least.

    .. math:: \frac{1}{B - f} \sum_{b \in S} g_b, \qquad
        S = \arg\min_{|S| = B - f} \ \max_{i, j \in S} \lVert g_i - g_j \rVert

    The set is the exact one. One pair of examples decides the diameter, so that several sets often
    have the least: the first of them in the order of the examples is taken.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `chosen` and
    `weights`.

    Args:
        f: How many examples may be arbitrary; `2f < B`.
        per: Whether the distances are those of whole gradients, or each parameter chooses its own.

    Raises:
        TypeError: `f` is not an integer.
        ValueError: `f` is negative, or `per` unknown; from `backward()`, the batch has fewer than
            `2f + 1` examples.

    Cost: That of `Krum`, and a search on the host, which waits for the distances. It takes up to
        `2^f` steps for each of `2 log2(B)` distances, and far fewer on gradients: seconds for
        `B = 128` with any `f`.

    Source: El-Mhamdi et al. 2019, arXiv:1905.03853.

    Example:
        >>> import torch, pycoherence as pc
        >>> found, report = pc.MDA(1).with_report(torch.tensor([[1.0], [9.0], [2.0], [4.0]]))
        >>> found, report.network.chosen
        (tensor([2.3333]), tensor([0, 2, 3]))
    """

    def nearest(self, space: GramSpace, kept: Tensor, size: int) -> list[int]:
        """See `SubsetRule.nearest`."""
        return least_diameter(space.sq_distances[kept][:, kept].cpu(), size)
