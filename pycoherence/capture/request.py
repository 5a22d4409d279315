"""The request: what a capture measures."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pycoherence.capture.groups import Grouping
from pycoherence.ranks import Ranks

Shape = Callable[[int, tuple[int, ...]], tuple[int, ...]]
"""Shape of an output, from the batch size and the parameter's shape."""

OnUnsupported = Literal["auto", "raise", "skip", "vmap"]
"""Example by example if it is small, refuse the parameter, leave it out, or example by example."""

LossScale = float | torch.amp.GradScaler | Callable[[Tensor], float]
"""A number, the scaler that multiplies the loss, or a function of what `backward()` starts from."""

GradScale = float | torch.amp.GradScaler
"""A number, or the scaler by which the optimizer divides gradients again."""


def per_example(batch: int, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each example."""
    return (batch,)


def per_pair(batch: int, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each pair of examples."""
    return (batch, batch)


def like_parameter(batch: int, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each of the parameter's."""
    return parameter


class Aggregate(NamedTuple):
    """A rule over the values of each coordinate.

    Attributes:
        rule: The argument `rule` of `Site.order`, which takes `k` and `drop` too.
        k: How much of the rule.
        drop: Whether values that are not finite are left out.
        count: Whether to keep how many coordinates of the result are not zero.
        outvoted: Whether to keep in how many coordinates each example is clipped or cut away.
    """

    rule: str
    k: float
    drop: bool
    count: bool
    outvoted: bool = False


class Request(NamedTuple):
    """The quantities to take of every site.

    Attributes:
        outputs: Fields of `pycoherence.ops.Reduced`, and their shapes.
        directions: The directions of the output `dots`, by parameter.
        sum_norms: Whether to keep numbers whose squares add up to the squared norm of the
            gradients' sum.
        factors: Whether to keep the factors of the per-example gradients.
        gradients: Whether the backward pass has to give the gradients of the parameters.
        aggregate: The rule it gives in their place; `None` for the gradients themselves.
        grouping: Which rows make one example.
        on_unsupported: The treatment of a parameter that is used in a way that is not known.
        loss_scale: The number that the loss is multiplied by, or what gives it when `backward()`
            starts.
        rule: The words for the rule that uses what is kept, which all processes have to agree on.
        ranks: The processes whose examples count; `None` for this one alone.
        is_mean: Whether the loss of each is the mean over its examples, and not their sum.
    """

    outputs: Mapping[str, Shape]
    directions: Mapping[str, Tensor] = MappingProxyType({})
    sum_norms: bool = False
    factors: bool = False
    gradients: bool = True
    aggregate: Aggregate | None = None
    grouping: Grouping = Grouping()
    on_unsupported: OnUnsupported = "auto"
    loss_scale: LossScale = 1.0
    rule: str = ""
    ranks: Ranks | None = None
    is_mean: bool = True

    @property
    def want(self) -> tuple[str, ...]:
        """The outputs that a site has to compute."""
        total = self.sum_norms or (self.gradients and self.aggregate is None)
        return tuple({*self.outputs, "weighted_sum"} if total else self.outputs)


_WHY = (
    "expected loss_scale to be a positive number, a torch.amp.GradScaler, or a function that gives "
    "the number for the loss, got {value!r}"
)


def check_loss_scale(value: Any) -> LossScale:
    """The value, if losses can be multiplied by it.

    Raises:
        TypeError: It is neither a number, a scaler nor a function.
        ValueError: It is not positive and finite.
    """
    known: LossScale = value
    if isinstance(known, torch.amp.GradScaler) or callable(known):
        return known
    return check_scale(value)


def check_grad_scale(value: Any) -> GradScale:
    """The value, if gradients can be multiplied by it.

    Raises:
        TypeError: It is neither a number nor a scaler.
        ValueError: It is not positive and finite.
    """
    known: GradScale = value
    if isinstance(known, torch.amp.GradScaler):
        return known
    return check_scale(
        known,
        "expected grad_scale to be a positive number or a torch.amp.GradScaler, got {value!r}",
    )


def check_scale(value: Any, why: str = _WHY) -> float:
    """The value, if it is a number that losses can be multiplied by."""
    why = why.format(value=value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(why)
    if not 0 < value < math.inf:
        raise ValueError(why)
    return float(value)


def scale_of(loss_scale: LossScale, roots: Sequence[Tensor]) -> float:
    """The number that the loss is multiplied by, at the start of a backward pass from `roots`.

    Raises:
        ValueError: A function is asked, and there is not one loss; what it gives is not positive
            and finite.
    """
    if isinstance(loss_scale, torch.amp.GradScaler):
        return loss_scale.get_scale()
    if not callable(loss_scale):
        return loss_scale
    if len(roots) != 1:
        raise ValueError(
            f"expected one loss, since loss_scale is a function of it, got {len(roots)}; add the "
            "losses up before backward()"
        )
    return check_scale(loss_scale(roots[0]))
