"""Which tiles `bench --tune` takes."""

import pytest
import torch


def test_the_fastest_of_those_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycoherence.triton_kernels import _tune
    from pycoherence.triton_kernels._tiles import Tile

    wrong, slow, fast = Tile(16, 16, 32, 4, 2), Tile(16, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)
    seconds = {wrong: 1.0, slow: 3.0, fast: 2.0}
    reduce = _tune.reduce

    def reduced(*args: object, tile: Tile) -> dict[str, torch.Tensor]:
        found = reduce(*args, tile=tile)
        return {k: x + (tile == wrong) for k, x in found.items()}

    monkeypatch.setattr(_tune, "reduce", reduced)
    monkeypatch.setattr(_tune, "_candidates", lambda kind: list(seconds))
    monkeypatch.setattr(_tune, "_seconds", lambda run: seconds.get(run.keywords["tile"], 4.0))
    x, g = torch.randn(2, 5, 20), torch.randn(2, 5, 30)
    times = _tune._times(x, g, frozenset(("sq_norms", "weighted_sum")), "float32")
    assert wrong not in times
    assert min(times, key=lambda tile: times[tile]) == fast
    assert len(times) == 3
