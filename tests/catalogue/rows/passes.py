"""How passes are run; docs/passes.md has more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catalogue.row import B, Row, normal, uses

features = normal(B, 6)
PASSES = "Passes and losses"


def again(m, x):
    return checkpoint(m.net, x, use_reentrant=False)


def nested(m, x):
    return checkpoint(lambda x: m.b(again(m, x)), x, use_reentrant=False)


def with_target(m, x):
    with torch.no_grad():
        target = m.net(x)
    return m.net(x).sin() - target


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, weights = batch
    return (weights.flatten() * model(x).square().sum(1)).mean()


def several(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    out = model(*batch)
    return F.smooth_l1_loss(out, out.detach().sin()) + 0.1 * out.square().sum(1).mean()


ROWS = [
    Row(PASSES, "activation checkpointing", uses(again, net=net), features),
    Row(
        PASSES,
        "activation checkpointing, nested, around a tied layer",
        uses(lambda m, x: m.b(nested(m, x)), net=net, b=lambda: nn.Linear(6, 6)),
        features,
    ),
    Row(PASSES, "a `torch.no_grad()` region", uses(with_target, net=net), features),
    Row(PASSES, "modules in eval mode", lambda: net().eval(), features),
    Row(
        PASSES,
        "per-example weights",
        net,
        lambda: (torch.randn(B, 6), torch.rand(B, 1)),
        loss=weighted,
    ),
    Row(PASSES, "several losses added", net, features, loss=several),
]
