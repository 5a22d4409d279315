"""Which tiles `bench --tune` takes."""

from concurrent.futures import Future

import pytest
import torch


def test_the_fastest_of_those_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycoherence.triton_kernels.engine import tune
    from pycoherence.triton_kernels.engine.factors import Factors
    from pycoherence.triton_kernels.engine.tiles import Tile

    wrong, slow, fast = Tile(16, 16, 32, 4, 2), Tile(16, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)
    seconds = {wrong: 1.0, slow: 3.0, fast: 2.0}
    reduce = tune.reduce

    def reduced(*args: object, tile: Tile) -> dict[str, torch.Tensor]:
        found = reduce(*args, tile=tile)
        return {k: x + (tile == wrong) for k, x in found.items()}

    monkeypatch.setattr(tune, "reduce", reduced)
    monkeypatch.setattr(tune, "_candidates", lambda kind: list(seconds))
    monkeypatch.setattr(tune, "_seconds", lambda run: seconds.get(run.keywords["tile"], 4.0))
    factors = Factors.of_linear(torch.randn(2, 5, 20), torch.randn(2, 5, 30))
    times = tune._times(factors, frozenset(("sq_norms", "weighted_sum")), "float32")
    assert wrong not in times
    assert min(times, key=lambda tile: times[tile]) == fast
    assert len(times) == 3


def test_every_candidate_is_compiled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycoherence.triton_kernels.engine import tune

    class Here:
        """Runs in this process what a pool would run in others."""

        def __init__(self, *args: object) -> None:
            pass

        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def submit(self, run, *args):
            run(*args)
            done = Future()
            done.set_result(None)
            return done

    seen = []
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(tune.torch, "zeros", lambda *shape, **_: torch.empty(shape))
    monkeypatch.setattr(
        tune, "reduce", lambda factors, wanted, tile: seen.append((factors.g.shape[2], tile))
    )
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        tune.compile_all()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(seen) == 3 * sum(len(tune._of(kind)) for kind in tune._KINDS)
    assert {t for t, _ in seen} == {tune._POSITIONS}
