"""Dot products of per-example gradients with each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pycoherence.capture import Shape, per_pair
from pycoherence.statistics._statistic import Batch, Raw, Statistic


@dataclass(frozen=True)
class Gram(Statistic):
    r"""All dot products of the per-example gradients, for each parameter and in total.

    .. math:: K_{bc} = \langle g_b, g_c \rangle

    Ask for it in `pycoherence.collect`; the record then has `gram`, `[B, B]`, in float32 (float64
    for float64 models).

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says.

    Cost: Memory of one `[B, B]` matrix for each parameter, also if only the total is read: 4 MiB in
    float32 for `B = 1024`, 600 MiB for a network of 150 parameters, so take smaller batches or
    freeze what is not of interest. Time as `pycoherence.ops.linear_reduce` for `gram`.

    Source: Fort et al. 2019, arXiv:1901.09491; Chatterjee 2020, arXiv:2002.10657.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> with pc.collect(model, pc.Gram(), loss_reduction="sum") as record:
        ...     model(x).sum().backward()
        >>> record.gram
        tensor([[1., 1.],
                [1., 5.]])
    """

    results: ClassVar[tuple[str, ...]] = ("gram",)

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """See `Statistic.outputs`."""
        return {"gram": per_pair}

    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """See `Statistic.read`."""
        return raw["gram"] * batch.share**2
