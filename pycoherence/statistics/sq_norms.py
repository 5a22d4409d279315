"""Squared norms of per-example gradients."""

from collections.abc import Mapping
from dataclasses import dataclass

from pycoherence.capture import Shape, per_example, scalar


@dataclass(frozen=True)
class SqNorms:
    r"""Squared norms of the per-example gradients, for each parameter and in total.

    .. math:: n_b = \lVert g_b \rVert^2

    Ask for it in `pycoherence.collect`; the record then has `sq_norms`, `[B]`, in float32 (float64
    for float64 models), and can give the `coherence()` of the batch.

    Cost: Of each parameter, one fused reduction in place of its ordinary gradient.

    Source: Goodfellow 2015, arXiv:1510.01799.
    """

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """As `Statistic.outputs`."""
        return {"sq_norms": per_example, "sum_sq_norm": scalar}
