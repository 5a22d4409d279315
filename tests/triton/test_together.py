"""Layers of a backward pass whose parameters are reduced together, in Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backends import TOLERANCE, assert_close
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.statistics import Statistic
from pycoherence.triton_kernels import _finish


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


class Layers(nn.Module):
    """Linear and normalisation layers and convolutions, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.conv(x)).mT)
        x = self.twice(torch.tanh(self.twice(x)))
        return self.out(x.mean(1))


def measured(
    model: nn.Module, x: Tensor, backend: str, *statistics: Statistic
) -> tuple[pc.Record, dict[str, Tensor]]:
    model.zero_grad()
    with pc.backend(backend), pc.collect(model, *statistics, loss_reduction="sum") as record:
        model(x).square().sum().backward()
    return record, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "statistics",
    [(pc.SqNorms(),), (pc.SqNorms(), pc.Moments()), (pc.SqNorms(), pc.Gram())],
    ids=["norms", "moments", "gram"],
)
def test_statistics_and_gradients(statistics: tuple[Statistic, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Layers().to(dtype), torch.randn(5, 3, 9).to(dtype)
    found, ours = measured(model, x, "triton", *statistics)
    expected, theirs = measured(model, x, "reference", *statistics)
    for name, gradient in theirs.items():
        assert ours[name].dtype == gradient.dtype == dtype
        assert_close(ours[name], gradient.double(), TOLERANCE[dtype], name)
    assert found.coherence().alpha == pytest.approx(expected.coherence().alpha, rel=1e-4)
    for name, one in found.by_parameter.items():
        for what in {name for statistic in statistics for name in statistic.results}:
            truth = getattr(expected.by_parameter[name], what).double()
            assert_close(getattr(one, what), truth, 1e-5, f"{what} of {name}")


def test_a_layer_is_one_last_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tasks = _finish._run, list[int]()

    def counted(of: Any) -> None:
        tasks.append(len(of))
        run(of)

    monkeypatch.setattr(_finish, "_run", counted)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    measured(model, torch.randn(5, 9, 6), "triton", pc.SqNorms())
    # The weight of the last layer, then both parameters of each layer.
    assert tasks == [1, 2, 2]
