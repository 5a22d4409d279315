"""Filtering by agreement on the emulated GPU agrees with the reference in float64."""

import pytest
import torch
from support.backends import TOLERANCE, assert_close, describe, in_float64

from pycoherence.ops.gram_filter import SPEC


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples(emulation, dtype):
    for gram, kept, threshold in SPEC.samples("cpu", dtype):
        expected = SPEC.reference(*in_float64((gram, kept, threshold)))
        found = [torch.full((len(gram),), torch.nan, dtype=dtype) for _ in expected]
        outputs = [out.numpy() for out in found]
        emulation.gram_filter(gram.contiguous().numpy(), kept.numpy(), threshold, *outputs)
        for ours, truth in zip(found, expected, strict=True):
            assert_close(ours, truth, TOLERANCE[dtype], describe((gram, kept, threshold)))
