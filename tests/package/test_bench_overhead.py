"""The benchmark of the capture's overhead counts and checks what it says it does."""

import pytest
import torch
from torch import Tensor, nn

from bench.shared.tasks import Task
from bench.training import overhead
from bench.training.floor import floor_of


class Nested(nn.Module):
    """Uses parameters by position, by name and in lists, and functions that use none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(2, 2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(torch.mm(x, self.a), other=self.b)
        return torch.relu(torch.cat([x, self.c]))


def test_uses_are_counted_wherever_the_parameters_stand() -> None:
    model, x = Nested(), torch.randn(2, 2)
    with overhead.Counted(Task(model, x, x)) as counted:
        model(x)
    assert (counted.all, counted.tracked) == (4, 3)


def test_layer_norms_are_uses_too() -> None:
    """Two embeddings, four blocks of two norms and four linear layers, a norm and the head."""
    task = overhead.small()
    with overhead.Counted(task) as counted:
        task.loss()
    assert counted.tracked == 2 + 4 * (2 + 4) + 2


@pytest.mark.parametrize("new", overhead.SMALL.values(), ids=overhead.SMALL)
def test_norms_are_right_before_they_are_timed(new) -> None:
    assert overhead.error_of_norms(new()) <= 1e-5


def test_the_floor_gives_the_same_norms() -> None:
    task = overhead.small()
    floored, found = floor_of(task)
    overhead.plain(floored)
    norms = torch.stack(found).sum(0) * len(task.x) ** 2
    torch.testing.assert_close(norms, overhead.with_norms(task))


def test_wrong_norms_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (0.0, float("nan")):
        monkeypatch.setattr(overhead, "with_norms", lambda task, x=wrong: torch.full((64,), x))
        assert not overhead.compare("MLP", overhead.mlp(), 1)
        assert "FAILED" in capsys.readouterr().out


def test_steps_are_timed_in_turns() -> None:
    ran = []
    steps = [lambda task, i=i: ran.append(i) for i in range(2)]
    assert len(overhead.least(overhead.mlp(), 3, *steps)) == 2
    assert ran[:2] == [0, 1]
