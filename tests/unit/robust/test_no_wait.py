"""Rules over whole examples never wait for the device, but where they say so.

Fake tensors have no numbers: whoever asks for one, or for a shape that depends on them, raises.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import pycoherence as pc
from pycoherence.capture import Factors
from pycoherence.robust import decide
from pycoherence.sites import LinearSite
from pycoherence.statistics import Batch

RULES: dict[str, Callable[[Any], Any]] = {
    "krum": lambda per: pc.Krum(2, 3, per=per),
    "bulyan": lambda per: pc.Bulyan(2, per=per),
    "geometric-median": lambda per: pc.GeometricMedian(4, per=per),
    "centered-clip": lambda per: pc.CenteredClip(0.3, 2, per=per),
    "norm-clip": lambda per: pc.NormClip(0.4, 1.0, per=per),
    "auto-clip": lambda per: pc.AutoClip(0.4, 1.0, per=per),
    "adaptive-clip": lambda per: pc.AdaptiveClip(0.4, 1.0, per=per, expected_batch_size=99),
    "gaf": lambda per: pc.GAF(0.9, per=per),
    "monna": lambda per: pc.MoNNA(3, 1, per=per),
    "nnm-krum": lambda per: pc.NNM(2, pc.Krum(2, per=per)),
    "arc-centered-clip": lambda per: pc.ARC(2, pc.CenteredClip(0.3, 2, per=per)),
}


def train(rule: Any, dtype: torch.dtype, nonfinite: Any) -> None:
    """Two steps, the second with a centre, on tensors without numbers."""
    with FakeTensorMode():
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 5, dtype=dtype), torch.nn.ReLU(), torch.nn.Linear(5, 3, dtype=dtype)
        )
        for _ in range(2):
            with pc.aggregate(model, rule, nonfinite=nonfinite):
                model(torch.randn(12, 6, dtype=dtype)).mean().backward()


@pytest.mark.parametrize("nonfinite", ["nan", "drop"])
@pytest.mark.parametrize("per", ["network", "parameter"])
@pytest.mark.parametrize("name", RULES)
def test_a_pass_in_float64(name: str, per: str, nonfinite: str) -> None:
    if (name, nonfinite) == ("bulyan", "drop"):  # how many rows are ordered the host has to know
        with pytest.raises(DataDependentOutputException):
            train(RULES[name](per), torch.float64, nonfinite)
    else:
        train(RULES[name](per), torch.float64, nonfinite)


@pytest.mark.parametrize("name", RULES)
def test_a_pass_in_float32(name: str) -> None:
    """Without numbers no one knows whether products have to be taken in float64, and both are."""
    train(RULES[name]("network"), torch.float32, "nan")


@pytest.mark.parametrize("name", RULES)
def test_decisions_stay_on_the_device(name: str) -> None:
    """Tensors of `meta` have no numbers either, and do not mix with those of the CPU."""
    rule = RULES[name]("network")
    x, g, v = (
        torch.empty(*shape, dtype=torch.float64, device="meta")
        for shape in ((12, 6), (12, 5), (5, 6))
    )
    factors = {"weight": Factors.of(LinearSite(x, g))}
    choice = decide(rule, factors, {"weight": v}, batch=Batch(12, 12), drop=False)
    mean = rule.mean(factors["weight"], 12, choice, drop=False)
    assert mean.shape == (5, 6)
    assert mean.is_meta
