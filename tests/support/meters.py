"""A meter that has seen a batch in parts, and when two results are the same."""

import math

from torch import Tensor, nn

import pycoherence as pc
from support.models import classification

MEAN = classification("mean")
Batch = tuple[Tensor, ...]


def metered(
    model: nn.Module, batch: Batch, sizes: list[int], reduction: str = "mean"
) -> pc.CoherenceMeter:
    """A meter that has seen the batch in parts of the given sizes."""
    meter = pc.CoherenceMeter(model, loss_reduction=reduction)
    for part in zip(*(x.split(sizes) for x in batch), strict=True):
        meter.update(classification(reduction), part)
    return meter


def assert_same(one: pc.Coherence, other: pc.Coherence, tolerance: float = 1e-10) -> None:
    assert one.n == other.n
    pairs = [(one, other)]
    pairs += [(one.by_parameter[n], other.by_parameter[n]) for n in one.by_parameter]
    pairs += [(one.by_module[n], other.by_module[n]) for n in one.by_module]
    for a, b in pairs:
        assert math.isclose(a.total_sq_norm, b.total_sq_norm, rel_tol=tolerance)
        assert math.isclose(a.sum_sq_norm, b.sum_sq_norm, rel_tol=tolerance, abs_tol=1e-20)
