"""Squared norms of per-example gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.capture import Shape, per_example
from pycoherence.sites import sq_norm
from pycoherence.statistics._statistic import Batch, Raw, Statistic


@dataclass(frozen=True)
class SqNorms(Statistic):
    r"""Squared norms of the per-example gradients, for each parameter and in total.

    .. math:: n_b = \lVert g_b \rVert^2

    Ask for it in `pycoherence.collect`; the record then has `sq_norms`, `[B]`, in float32 (float64
    for float64 models), and can give the `coherence()` of the batch.

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says.

    Cost: For each parameter, one fused reduction in place of its ordinary gradient.

    Source: Goodfellow 2015, arXiv:1510.01799.
    """

    results: ClassVar[tuple[str, ...]] = ("sq_norms",)

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """See `Statistic.outputs`."""
        return {"sq_norms": per_example}

    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """See `Statistic.read`."""
        norms = raw_sq_norms(raw)
        assert norms is not None
        return norms * batch.share**2

    def read_total(self, result: str, raws: Sequence[Raw], batch: Batch) -> Tensor | None:
        """Give one sum for all, if they lie on one device; see `Statistic.read_total`."""
        norms = [raw["sq_norms"] for raw in raws if "sq_norms" in raw]
        kinds = {(x.device, x.dtype) for x in norms}
        if len(norms) < len(raws) or len(kinds) != 1:
            return None
        return torch.stack(norms).sum(0) * batch.share**2


def raw_sq_norms(raw: Raw) -> Tensor | None:
    """The squared norms of the loss as it is, if there is something to tell them."""
    if "sq_norms" in raw:
        return raw["sq_norms"]
    return raw["gram"].diagonal() if "gram" in raw else None


def can_tell_sum(raw: Raw) -> bool:
    """Whether `sum_sq_norm` can be told."""
    return not raw.keys().isdisjoint(("sum_dots", "weighted_sum", "sum_norms"))


def sum_sq_norm(raw: Raw) -> Tensor:
    """`||sum_b g_b||^2` of one parameter, in float64, from what there is to tell it."""
    if "sum_dots" in raw:
        return raw["sum_dots"].double().sum()
    return sq_norm(raw["sum_norms" if "sum_norms" in raw else "weighted_sum"])
