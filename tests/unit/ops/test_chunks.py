"""The references work through the batch in chunks; how large they are must not matter."""

from types import SimpleNamespace

import pytest
import torch
from support.backends import assert_close, assert_reduced_close, describe
from support.settings import workspace

import pycoherence as pc
from pycoherence.ops.core.chunks import Chunks
from pycoherence.ops.core.workspace import _of_gpu

CHUNKED = [op for op in pc.ops.specs if op.endswith(("_reduce", "_gram", "_order"))]


@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("size", [1, 2400])
def test_chunk_size_changes_nothing(op: str, size: int) -> None:
    spec = pc.ops.specs[op]
    samples = list(spec.samples("cpu", torch.float64))
    whole = [spec.reference(*args) for args in samples]
    with workspace(size):
        for args, expected in zip(samples, whole, strict=True):
            close = assert_close if isinstance(expected, torch.Tensor) else assert_reduced_close
            close(spec.reference(*args), expected, 1e-12, describe(args))


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9])
def test_chunks_cover_the_batch_in_order(batch: int) -> None:
    with workspace(4 * 5 * 8):
        parts = Chunks.of(lambda part: torch.empty(0), batch, 5, torch.float64).parts
    assert [b for part in parts for b in range(batch)[part]] == list(range(batch))
    assert all(part.stop - part.start <= 4 for part in parts)


@pytest.mark.parametrize("size", [0, -1])
def test_a_workspace_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"1 to .* bytes, got {size}"):
        pc.set_workspace(size)
    assert pc.workspace() == 64 * 2**20


@pytest.mark.parametrize("size", [1.5, "64M", True])
def test_a_workspace_is_an_integer(size: object) -> None:
    with pytest.raises(TypeError, match=f"integer number of bytes, got {size!r}"):
        pc.set_workspace(size)  # pyright: ignore[reportArgumentType]
    assert pc.workspace() == 64 * 2**20


def test_a_workspace_beyond_what_is_counted_changes_nothing() -> None:
    with pytest.raises(ValueError, match="1 to 2"):
        pc.set_workspace(2**70)
    assert pc.workspace() == 64 * 2**20


def test_a_gpu_gives_a_part_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {0: 8 * 2**30, 1: 2**30}
    found = [SimpleNamespace(total_memory=size) for size in sizes.values()]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    _of_gpu.cache_clear()
    gpus = [torch.device("cuda", index) for index in sizes]
    assert [pc.workspace(gpu) for gpu in gpus] == [64 * 2**20, 64 * 2**20]
    _of_gpu.cache_clear()
    found[0].total_memory = 141 * 2**30
    assert pc.workspace(gpus[0]) == 141 * 2**23
    with workspace(1000):
        assert pc.workspace(gpus[0]) == 1000
    _of_gpu.cache_clear()


def test_the_gram_of_a_batch_with_itself_is_symmetric_to_the_bit() -> None:
    rows = torch.randn(33, 1, 453, generator=torch.Generator().manual_seed(0))
    with pc.backend("reference"), workspace(40_000):
        whole = pc.ops.dense_gram(rows.flatten(1))
        inside = pc.ops.linear_reduce(rows, torch.ones(33, 1, 1), want=("gram",)).gram
    for gram in (whole, inside):
        assert torch.equal(gram, gram.mT)
