"""What a capture is asked to measure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from pycoherence.capture._loss_scale import LossScale
from pycoherence.capture._probes import Shape

OnUnsupported = Literal["raise", "skip", "vmap"]
"""Refuse the parameter, leave it out, or make its gradients example by example."""


class Order(NamedTuple):
    """A rule over the values of each coordinate.

    Attributes:
        rule: As `Site.order` takes it; so are `k` and `drop`.
        k: How much of the rule.
        drop: Whether values that are not finite are left out.
        count: Whether to keep how many coordinates of the result are not zero.
    """

    rule: str
    k: float
    drop: bool
    count: bool


class Plan(NamedTuple):
    """What to take of every site.

    Attributes:
        outputs: Fields of `pycoherence.ops.Reduced`, and the shapes of their probes.
        directions: What the output `dots` is taken with, by parameter.
        sum_norms: Whether to keep norms of the rows of the gradients' sum.
        factors: Whether to keep the factors of the per-example gradients.
        gradients: Whether the backward pass has to give the gradients of the parameters.
        order: What it gives in their place; `None` for the gradients themselves.
        group_size: How many consecutive rows make one example.
        on_unsupported: What becomes of a parameter that is used in a way that is not known.
        loss_scale: What the loss is multiplied by.
    """

    outputs: Mapping[str, Shape]
    directions: Mapping[str, Tensor] = MappingProxyType({})
    sum_norms: bool = False
    factors: bool = False
    gradients: bool = True
    order: Order | None = None
    group_size: int = 1
    on_unsupported: OnUnsupported = "raise"
    loss_scale: LossScale = 1.0

    @property
    def want(self) -> tuple[str, ...]:
        """The outputs that a site has to compute."""
        total = self.sum_norms or (self.gradients and self.order is None)
        return tuple({*self.outputs, "weighted_sum"} if total else self.outputs)
