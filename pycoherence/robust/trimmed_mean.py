"""Trimmed mean."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule, check_clip


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    r"""At each coordinate the mean of the examples' values without the outermost.

    .. math:: \frac{1}{B - 2k} \sum_{i = k+1}^{B-k} g_{(i)}

    with `g_(1) <= ... <= g_(B)` the sorted values of the coordinate. `k = 0` is the plain mean,
    where some implementations give nothing.

    Give it to `pycoherence.aggregate`. The report has `clipped`, `2k / B`.

    Args:
        k: How many values are cut away on each side; `2k < B`.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is negative; from `backward()`, the batch has fewer than `2k + 1` examples.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Yin et al. 2018, arXiv:1803.01498.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [7.0], [1000.0]])
        >>> with pc.aggregate(model, pc.TrimmedMean(1)):
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the mean of 2, 3, 7
        tensor([[4.]])
    """

    k: int

    def __post_init__(self) -> None:
        self.coerce_int("k")

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "trimmed_mean", self.k

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return check_clip(self.k, n)

    def clipped(self, n: int) -> float | None:
        """See `CoordinateRule.clipped`."""
        return 2 * self.k / n
