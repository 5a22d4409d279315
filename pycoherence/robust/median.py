"""Median."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule


@dataclass(frozen=True)
class Median(CoordinateRule):
    r"""At each coordinate the median of the examples' values.

    .. math:: \tfrac12 \big( g_{(\lceil B/2 \rceil)} + g_{(\lfloor B/2 \rfloor + 1)} \big)

    with `g_(1) <= ... <= g_(B)` the sorted values of the coordinate: for even `B` the mean of the
    two middle ones, as in the paper. `torch.median` gives the lower of them, and so does `lower`.

    Give it to `pycoherence.aggregate`.

    Args:
        lower: Whether to take the lower of two middle values.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Yin et al. 2018, arXiv:1803.01498.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [4.0], [1000.0]])
        >>> with pc.aggregate(model, pc.Median()):
        ...     model(x).mean().backward()
        >>> model.weight.grad
        tensor([[3.]])
    """

    lower: bool = False

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "lower_median" if self.lower else "median", 0

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None
