"""Sums of the signs of per-example gradients, coordinate by coordinate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pycoherence.capture import Shape, like_parameter
from pycoherence.statistics._statistic import Batch, Raw, Statistic


@dataclass(frozen=True)
class SignSum(Statistic):
    r"""Examples that want a coordinate smaller minus those that want it larger.

    .. math:: s = \sum_b \operatorname{sign}(g_b)

    Ask for it in `pycoherence.collect`; each parameter of the record then has `sign_sum`, of its
    shape, in float32 (float64 for float64 models): whole numbers from `-B` to `B`. A gradient of
    zero counts for neither side, one that is NaN makes its coordinate NaN.

    Scaling: None, whatever `loss_reduction` says.

    Cost: For each parameter, one fused reduction in place of its ordinary gradient; memory of one
    gradient.

    Source: Parascandolo et al. 2020, arXiv:2009.00329.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, -2.0]])
        >>> with pc.collect(model, pc.SignSum()) as record:
        ...     model(x).mean().backward()
        >>> record.by_parameter["weight"].sign_sum
        tensor([[ 2., -1.]])
    """

    results: ClassVar[tuple[str, ...]] = ("sign_sum",)

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """See `Statistic.outputs`."""
        return {"sign_sum": like_parameter}

    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """See `Statistic.read`."""
        return raw["sign_sum"].clone()
