"""The geometric median on the emulated GPU agrees with the reference in float64."""

import numpy as np
import pytest
import torch
from support.backends import TOLERANCE, assert_close, describe, in_float64
from torch import Tensor

from pycoherence.ops.gram_median import SPEC


def run(emulation, gram: Tensor, kept: Tensor, *args: float) -> tuple[Tensor, Tensor]:
    gram = gram.contiguous()
    out, ran = gram.new_empty(len(gram)), gram.new_empty(())
    emulation.gram_median(gram.numpy(), kept.numpy(), *args, out.numpy(), ran.numpy())
    return out, ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples(emulation, dtype):
    for args in SPEC.samples("cpu", dtype):
        found, expected = run(emulation, *args), SPEC.reference(*in_float64(args))
        for ours, truth in zip(found, expected, strict=True):
            assert_close(ours, truth, TOLERANCE[dtype], describe(args))


def test_a_number_that_is_not_finite_shows(emulation):
    gram, kept = torch.eye(5), torch.ones(5, dtype=torch.bool)
    gram[1, 1] = torch.nan
    out, ran = run(emulation, gram, kept, 1.0, 0.0, 3)
    assert out.isnan().all()
    assert ran == 3


def test_more_points_than_shared_memory_holds_are_an_error(emulation):
    gram = np.broadcast_to(np.float32(0), (6001, 1))
    with pytest.raises(ValueError, match="launch"):
        emulation.gram_median(gram, np.ones(6001, bool), 1.0, 0.0, 1, np.ones(1), np.ones(1))
