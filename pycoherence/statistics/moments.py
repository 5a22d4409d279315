"""First and second moments of per-example gradients, coordinate by coordinate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pycoherence.capture import Shape, like_parameter
from pycoherence.statistics._statistic import Batch, Raw, Statistic


@dataclass(frozen=True)
class Moments(Statistic):
    r"""Mean and mean square of the per-example gradients, coordinate by coordinate.

    .. math:: m_1 = \frac{1}{B} \sum_b g_b, \qquad m_2 = \frac{1}{B} \sum_b g_b^2

    Ask for it in `pycoherence.collect`; each parameter of the record then has `first_moment` and
    `second_moment`, of its shape, in float32 (float64 for float64 models). Their spread is the
    variance `m_2 - m_1^2`.

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says, so that
    `first_moment` is what `.grad` gets with `"mean"`, and `1 / B` of it with `"sum"`.

    Cost: For each parameter, one fused reduction in place of its ordinary gradient; memory of two
    gradients.

    Source: Liu et al. 2020, arXiv:2001.07384.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> with pc.collect(model, pc.Moments(), loss_reduction="sum") as record:
        ...     model(x).sum().backward()
        >>> weight = record.by_parameter["weight"]
        >>> weight.first_moment, weight.second_moment
        (tensor([[1., 1.]]), tensor([[1., 2.]]))
    """

    results: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """See `Statistic.outputs`."""
        return {"weighted_sum": like_parameter, "second_moment": like_parameter}

    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """See `Statistic.read`."""
        if result == "first_moment":
            return raw["weighted_sum"] * (batch.share / max(batch.size, 1))
        return raw["second_moment"] * (batch.share**2 / max(batch.size, 1))
