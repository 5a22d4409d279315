"""No rule ever holds the gradients of all examples."""

from typing import Any

import pytest
import torch
from support.settings import workspace
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pycoherence as pc

RULES = (
    *(pc.Winsorized(2), pc.Winsorized(20), pc.Median(), pc.MedianOfMeans(3), pc.Phocas(3)),
    *(pc.Krum(2), pc.Bulyan(3), pc.CenteredClip(0.5), pc.NormClip(0.5)),
    *(pc.MDA(3), pc.NNM(3, pc.Krum(2)), pc.NNM(3, pc.TrimmedMean(2))),
)


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_peak(rule: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    x = torch.randn(96, 256)
    all_gradients = 4 * len(x) * sum(p.numel() for p in model.parameters())

    def step() -> None:
        model.zero_grad()
        with pc.aggregate(model, rule, outvoted=isinstance(rule, (pc.Winsorized, pc.Phocas))):
            model(x).square().sum(1).mean().backward()

    with workspace(2**20):
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert changes
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    assert peak < all_gradients / 6
