"""The reference works through the batch in chunks; how large they are must not matter."""

import pytest
import torch
from backends import assert_reduced_close, describe

import pycoherence as pc
from pycoherence.ops import _reduce

REDUCTIONS = [op for op in pc.ops.specs if op.endswith("_reduce")]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("elements", [1, 300])
def test_chunk_size_changes_nothing(
    op: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pc.ops.specs[op]
    samples = list(spec.samples("cpu", torch.float64))
    whole = [spec.reference(*args) for args in samples]
    monkeypatch.setattr(_reduce, "_CHUNK_ELEMENTS", elements)
    for args, expected in zip(samples, whole, strict=True):
        assert_reduced_close(spec.reference(*args), expected, 1e-12, describe(args))


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9])
def test_chunks_cover_the_batch_in_order(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reduce, "_CHUNK_ELEMENTS", 20)
    parts = list(_reduce.chunks(batch, 5))
    assert [b for part in parts for b in range(batch)[part]] == list(range(batch))
    assert all(part.stop - part.start <= 4 for part in parts)
