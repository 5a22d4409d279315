"""Median of means."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule


@dataclass(frozen=True)
class MedianOfMeans(CoordinateRule):
    r"""At each coordinate the median of the mean values of a few groups of examples.

    .. math:: \operatorname{median}_j \ \frac{1}{|J_j|} \sum_{b \in J_j} g_b

    The groups are consecutive examples, whose numbers differ by at most one, larger groups first;
    so shuffle the batch. With three groups it is the M3 of the paper; for an even number it is the
    mean of the two middle means.

    Give it to `pycoherence.aggregate`.

    Args:
        groups: How many, from 1 (the plain mean) to `B` (the median).

    Raises:
        TypeError: `groups` is not an integer.
        ValueError: It is less than one; from `backward()`, the batch has fewer examples.

    Cost: Little more than the ordinary weight gradients, in whose place it is.

    Source: Zielinski et al. 2020, arXiv:2003.07422. The M3 of its code takes the groups from three
    successive batches; `pycoherence.optim.M3` does that.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0], [5.0], [1000.0], [4.0], [4.0]])
        >>> with pc.aggregate(model, pc.MedianOfMeans(3)):
        ...     model(x).mean().backward()
        >>> model.weight.grad  # the median of 2, 502.5, 4
        tensor([[4.]])
    """

    groups: int

    def __post_init__(self) -> None:
        self.coerce_int("groups", 1)

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "median_of_means", self.groups

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if self.groups <= n:
            return None
        return f"makes {self.groups} groups, for which a batch needs as many examples"
