"""Sign agreement."""

from dataclasses import dataclass

from pycoherence.robust._rule import CoordinateRule


@dataclass(frozen=True)
class SignAgreement(CoordinateRule):
    r"""At each coordinate the mean of the examples' values if their signs agree, and else zero.

    .. math:: \frac{1}{B} \sum_b g_b \ \text{where} \
        \Big| \frac{1}{B} \sum_b \operatorname{sign}(g_b) \Big| \ge \tau

    It is the arithmetic AND-mask of the paper, which compares environments where this compares
    examples. Its code may also divide by the fraction kept; that is left to you, as
    `report.by_parameter[name].kept`: the fraction of coordinates that are not zero.

    Give it to `pycoherence.aggregate`.

    Args:
        threshold: `tau`, from 0 (the plain mean) to 1 (all signs must be equal).

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: It is not in this range.

    Cost: That of `pycoherence.ops.linear_order`, in place of the ordinary weight gradients.

    Source: Parascandolo et al. 2020, arXiv:2009.00329.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 5.0], [2.0, -4.0], [3.0, -1.0]])
        >>> with pc.aggregate(model, pc.SignAgreement(0.9)) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad
        tensor([[2., 0.]])
        >>> agg.report.by_parameter["weight"].kept
        0.5
    """

    threshold: float

    def __post_init__(self) -> None:
        self.coerce_float("threshold", positive=False)
        if self.threshold > 1:
            raise ValueError(f"expected a threshold from 0 to 1, got {self.threshold}")

    @property
    def aggregate(self) -> tuple[str, float]:
        """See `CoordinateRule.aggregate`."""
        return "sign_agreement", self.threshold

    @property
    def counts(self) -> bool:
        """See `CoordinateRule.counts`."""
        return True

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None
