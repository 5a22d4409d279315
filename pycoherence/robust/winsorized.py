"""Winsorized mean."""

import warnings
from dataclasses import dataclass

import numpy as np

from pycoherence.robust._rule import CoordinateRule, check_clip, check_count, check_number


@dataclass(frozen=True)
class Winsorized(CoordinateRule):
    r"""At each coordinate the mean of the examples' values, the outermost pulled in.

    .. math:: \frac{1}{B} \sum_b \operatorname{clip}(g_b, g_{(k+1)}, g_{(B-k)})

    with `g_(1) <= ... <= g_(B)` the sorted values of the coordinate. `k = 0` is the plain mean.

    Give it to `pycoherence.aggregate`. The report has `clipped`, `2k / B`.

    Args:
        k: How many values are clipped on each side; `2k < B`.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is negative; from `backward()`, the batch has fewer than `2k + 1` examples.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Chatterjee 2020, arXiv:2002.10657. Its code clips at percentiles; see `from_percentile`.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]])
        >>> with pc.aggregate(model, pc.Winsorized(1)):
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the mean of 2, 2, 3, 4, 4
        tensor([[3.]])
    """

    k: int

    def __post_init__(self) -> None:
        self.coerce_int("k")

    @classmethod
    def from_percentile(cls, c: float, batch_size: int) -> "Winsorized":
        """The rule that clips at the `c`-th and the `(100 - c)`-th percentile, as the paper does.

        The percentiles are the nearest of the values, so that whole values are clipped. In small
        batches that is a trap: for `B = 32` and `c = 1` nothing is clipped, and a
        `UserWarning` says so; for `B = 16` and `c = 10` the paper's code clips two values below
        and one above, since ties round to even; here it is two on each side.

        Args:
            c: Percent on each side, from 0 to 50, which is the median.
            batch_size: `B`, one or more.

        Raises:
            ValueError: They are not in these ranges.

        Example:
            >>> Winsorized.from_percentile(2, 100), Winsorized.from_percentile(5, 32)
            (Winsorized(k=2), Winsorized(k=2))
        """
        batch_size = check_count("batch_size", batch_size, 1)
        c = check_number("c", c, positive=False)
        if c > 50:
            raise ValueError(f"expected a percentile c of at most 50 on each side, got {c}")
        last = batch_size - 1
        ranks = np.percentile(np.arange(batch_size), [c, 100 - c], method="nearest")
        k = min(max(int(ranks[0]), last - int(ranks[1])), last // 2)
        if k == 0 and c > 0:
            warnings.warn(
                f"c = {c:g} percent of batch_size = {batch_size} rounds to k = 0, which clips "
                "nothing and is the plain mean; take a larger c or larger batches",
                stacklevel=2,
            )
        return cls(k)

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "winsorized_mean", self.k

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return check_clip(self.k, n)

    def clipped(self, n: int) -> float | None:
        """See `CoordinateRule.clipped`."""
        return 2 * self.k / n
