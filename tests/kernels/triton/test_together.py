"""Layers of a backward pass whose parameters are reduced together, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from support.backends import TOLERANCE, assert_close
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.ops.core.outputs import mask
from pycoherence.statistics import Statistic
from pycoherence.triton_kernels.affine_reduce import affine_reduce
from pycoherence.triton_kernels.launch import finish
from pycoherence.triton_kernels.launch.together import together


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
    model: nn.Module, x: Tensor, backend: str, *statistics: Statistic, scale: float = 1.0
) -> tuple[pc.Record, dict[str, Tensor]]:
    model.zero_grad()
    with pc.backend(backend), pc.collect(model, *statistics, loss_reduction="sum") as record:
        (model(x).square().sum() * scale).backward()
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
    run, tasks = finish._run, list[int]()

    def counted(of: Any) -> None:
        tasks.append(len(of))
        run(of)

    monkeypatch.setattr(finish, "_run", counted)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    measured(model, torch.randn(5, 9, 6), "triton", pc.SqNorms())
    # The weight of the last layer, then both parameters of each layer.
    assert tasks == [1, 2, 2]


def test_norms_of_sums_keep_the_range() -> None:
    """The norm of a sum may be as many times that of a gradient as there are examples."""
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).double()
    for scale in (1e17, 1e-17):
        x = torch.randn(200, 3, 6, dtype=torch.float64)
        found, expected = (
            measured(model.to(dtype), x.to(dtype), backend, pc.SqNorms(), scale=scale)[0]
            for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference"))
        )
        assert found.coherence().alpha == pytest.approx(expected.coherence().alpha, rel=1e-4)


def test_rows_of_many_examples_are_added_up_in_their_dtype() -> None:
    g = torch.randn(2048, 1, 3, dtype=torch.float64)
    g[0], g[1500] = 1e9, -1e9
    call = affine_reduce, (g, None, None, None, None, None, mask(("weighted_sum",)))
    ((outputs, _),) = together([call], [torch.float32], True)
    assert_close(outputs[2], g.sum((0, 1)), 1e-6)
