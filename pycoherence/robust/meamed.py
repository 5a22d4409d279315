"""Mean around median."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule


@dataclass(frozen=True)
class MeaMed(CoordinateRule):
    r"""At each coordinate the mean of the `B - k` values nearest to their median.

    .. math:: \frac{1}{B - k} \sum_{b \in J} g_b, \qquad
        J = \text{the } B - k \text{ values nearest to } \operatorname{median}_b g_b

    The median of an even number of values is the mean of the two middle ones. If two values are
    equally far from it, the lower one is taken first.

    Give it to `pycoherence.aggregate`.

    Args:
        k: How many examples may be arbitrary; `k < B`.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is negative; from `backward()`, the batch has no more than `k` examples.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Xie et al. 2018, arXiv:1802.10116.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [1000.0]])
        >>> with pc.aggregate(model, pc.MeaMed(2)):
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the mean of the two nearest to 2.5
        tensor([[2.5000]])
    """

    k: int

    def __post_init__(self) -> None:
        self.coerce_int("k")

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "meamed", self.k

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if self.k < n:
            return None
        return f"leaves out k = {self.k} values, for which a batch needs more examples"
