"""How passes are run; docs/passes.md has more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catalogue.row import B, Topic, linear, normal, uses

features = normal(B, 6)
PASSES = Topic("Passes and losses")


def again(m, x):
    return checkpoint(m.net, x, use_reentrant=False)


def nested(m, x):
    return checkpoint(lambda x: m.b(again(m, x)), x, use_reentrant=False)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, weights = batch
    return (weights.flatten() * model(x).square().sum(1)).mean()


def added(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    out = model(*batch)
    return F.smooth_l1_loss(out, out.detach().sin()) + 0.1 * out.square().sum(1).mean()


PASSES.add("activation checkpointing", uses(again, net=net), features)
PASSES.add(
    "activation checkpointing, nested, around a tied layer",
    uses(lambda m, x: m.b(nested(m, x)), net=net, b=linear(6, 6)),
    features,
)
PASSES.add("modules in eval mode", lambda: net().eval(), features)
PASSES.add("per-example weights", net, lambda: (torch.randn(B, 6), torch.rand(B, 1)), loss=weighted)
PASSES.add("several losses added", net, features, loss=added)


@PASSES("a `torch.no_grad()` region", features, net=net)
def with_target(m, x):
    with torch.no_grad():
        target = m.net(x)
    return m.net(x).sin() - target
