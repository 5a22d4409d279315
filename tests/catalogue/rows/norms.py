"""Normalisation layers."""

from collections.abc import Callable

from torch import nn

from catalogue.row import B, Topic, normal

T, C = 3, 6
NORMS = Topic("Normalisation")


def randomised(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """With scales, shifts and running statistics that are not ones and zeros."""

    def make() -> nn.Module:
        layer = build()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.6)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                nn.init.uniform_(buffer, 0.5, 2)
        return layer

    return make


for name, build, shape in (
    ("`nn.LayerNorm`", lambda: nn.LayerNorm(C), (T, C)),
    ("`nn.LayerNorm(bias=False)`", lambda: nn.LayerNorm((T, C), bias=False), (5, T, C)),
    ("`nn.RMSNorm`", lambda: nn.RMSNorm(C), (T, C)),
    ("`nn.GroupNorm`", lambda: nn.GroupNorm(2, C), (C, 3, 5)),
    ("`nn.InstanceNorm2d(affine=True)`", lambda: nn.InstanceNorm2d(C, affine=True), (C, 3, 5)),
    ("`nn.BatchNorm2d in eval mode`", lambda: nn.BatchNorm2d(C).eval(), (C, 3, 5)),
):
    NORMS.add(name, randomised(build), normal(B, *shape))
NORMS.add(
    "`nn.BatchNorm2d` in training mode",
    lambda: nn.BatchNorm2d(C),
    normal(B, C, 3, 5),
    "refused",
    says="mix",
)
