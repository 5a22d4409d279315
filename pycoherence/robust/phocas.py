"""Phocas."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule, check_clip


@dataclass(frozen=True)
class Phocas(CoordinateRule):
    r"""At each coordinate the mean of the `B - k` values nearest to their trimmed mean.

    .. math:: \frac{1}{B - k} \sum_{b \in J} g_b, \qquad
        J = \text{the } B - k \text{ values nearest to } \frac{1}{B - 2k} \sum_{i=k+1}^{B-k} g_{(i)}

    If two values are equally far, the lower one is taken first.

    Give it to `pycoherence.aggregate`.

    Args:
        k: How many examples may be arbitrary; `2k < B`.

    Raises:
        TypeError: `k` is not an integer.
        ValueError: `k` is negative; from `backward()`, the batch has fewer than `2k + 1` examples.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Xie et al. 2018, arXiv:1805.09682.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]])
        >>> with pc.aggregate(model, pc.Phocas(1)):
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the mean of the four nearest to 3
        tensor([[2.5000]])
    """

    k: int

    def __post_init__(self) -> None:
        self.coerce_int("k")

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "phocas", self.k

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return check_clip(self.k, n)
