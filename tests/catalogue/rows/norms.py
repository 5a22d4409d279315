"""Normalisation layers."""

from torch import nn

from catalogue.layers import randomise
from catalogue.row import B, Topic, normal

T, C = 3, 6
NORMS = Topic("Normalisation")


for name, build, shape in (
    ("`nn.LayerNorm`", lambda: nn.LayerNorm(C), (T, C)),
    ("`nn.LayerNorm(bias=False)`", lambda: nn.LayerNorm((T, C), bias=False), (5, T, C)),
    ("`nn.RMSNorm`", lambda: nn.RMSNorm(C), (T, C)),
    ("`nn.GroupNorm`", lambda: nn.GroupNorm(2, C), (C, 3, 5)),
    ("`nn.InstanceNorm2d(affine=True)`", lambda: nn.InstanceNorm2d(C, affine=True), (C, 3, 5)),
    ("`nn.BatchNorm2d in eval mode`", lambda: nn.BatchNorm2d(C).eval(), (C, 3, 5)),
):
    # With scales, shifts and running statistics that are not ones and zeros.
    NORMS.add(name, lambda build=build: randomise(build()), normal(B, *shape))
NORMS.add(
    "`nn.BatchNorm2d` in training mode",
    lambda: nn.BatchNorm2d(C),
    normal(B, C, 3, 5),
    "refused",
    says="mix",
)
