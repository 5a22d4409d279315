"""Smallest maximum eigenvalue averaging."""

from dataclasses import dataclass
from math import comb

from torch import Tensor

from pycoherence.robust._space import GramSpace
from pycoherence.robust._subset_rule import SubsetRule
from pycoherence.robust._subsets import least_spread

_MOST_SETS = 200_000


@dataclass(frozen=True)
class SMEA(SubsetRule):
    r"""The mean of the `B - f` examples that spread least in the direction in which they do most.

    .. math:: \frac{1}{B - f} \sum_{b \in S} g_b, \qquad
        S = \arg\min_{|S| = B - f} \ \lambda_{\max} \Big( \frac{1}{|S|} \sum_{b \in S}
        (g_b - \bar g_S) (g_b - \bar g_S)^\top \Big)

    All sets are compared, and the eigenvalues are those of their centred Gram matrices. byzfl takes
    one step of power iteration from a random vector in their place, and may choose another set. If
    two sets are equal, the first in the order of the examples is taken.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `chosen` and
    `weights`.

    Args:
        f: How many examples may be arbitrary; `2f < B`.
        per: Whether the eigenvalues are those of whole gradients, or each parameter chooses its
            own.

    Raises:
        TypeError: `f` is not an integer.
        ValueError: `f` is negative, or `per` unknown; from `backward()`, the batch has fewer than
            `2f + 1` examples, or more than 200000 sets of `B - f`.

    Cost: That of `Krum`, and the eigenvalues of each set on the host, which waits for the Gram
        matrix: a second for `B = 20` and `f = 6`.

    Source: Allouah et al. 2023, arXiv:2302.04787.

    Example:
        >>> import torch, pycoherence as pc
        >>> vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 5.0]])
        >>> found, report = pc.SMEA(1).with_report(vectors)
        >>> found, report.network.chosen
        (tensor([0.3333, 0.3333]), tensor([0, 1, 2]))
    """

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        sets = comb(n, self.f)
        if n >= self.least and sets > _MOST_SETS:
            return (
                f"compares all sets of B - f examples, of which {n} have {sets}, and takes up to "
                f"{_MOST_SETS}; MDA chooses sets of any number"
            )
        return super().check_batch(n)

    def nearest(self, space: GramSpace, kept: Tensor, size: int) -> list[int]:
        """See `SubsetRule.nearest`."""
        return least_spread(space.gram[kept][:, kept].cpu(), size)
