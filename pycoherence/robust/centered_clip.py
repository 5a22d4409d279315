"""Centred clipping."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice
from pycoherence.robust.centre import Centre


@dataclass(frozen=True)
class CenteredClip(GramRule):
    r"""The centre of the last batch, moved by the examples' clipped differences from it.

    .. math:: v \leftarrow v + \frac{1}{B} \sum_b (g_b - v)
        \min\Big(1, \frac{\tau}{\lVert g_b - v \rVert}\Big)

    once for each iteration, as in the paper. The result is the new `v`, which is carried over to
    the next batch; at first it is zero.

    State: `v` belongs to this object, as its attribute `centre` (a `Centre`). Use one rule object
    for all steps of a training run, and another one for another model; put `rule.state_dict()`
    into checkpoints. It moves when `backward()` returns, unless the result is not finite.

    If the loss is scaled or divided (`GradScaler`, `loss / 4`), say so with the `loss_scale` of
    `pycoherence.aggregate`; otherwise the radius means something else. Each batch of a step of
    several moves the centre.

    Give it to `pycoherence.aggregate`. The report has `weights` (what is missing to one is the
    weight of the old `v`), `iterations`, and `clipped`: the fraction of examples beyond the radius
    in the last one.

    Args:
        radius: `tau`, in the units of `||g_b||`.
        iterations: How many for each batch.
        per: Whether the distances are those of whole gradients, or each parameter is clipped alone.

    Raises:
        TypeError: An argument is not a number.
        ValueError: `radius` is not positive, `iterations` less than one, or `per` unknown; on
            entering `aggregate`, the centre is of another model.

    Cost: That of `Krum`, and the dot products of the gradients with `v`; memory of one gradient.

    Source: Karimireddy et al. 2021, arXiv:2012.10333.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [1000.0]])
        >>> rule = pc.CenteredClip(radius=2.0)
        >>> for _ in range(2):
        ...     model.zero_grad()
        ...     with pc.aggregate(model, rule):
        ...         model(x).mean().backward()
        >>> model.weight.grad  # 1.75 after the first, and then + (-0.75 + 0.25 + 1.25 + 2) / 4
        tensor([[2.4375]])
    """

    radius: float
    iterations: int = 1
    per: Per = "network"
    centre: Centre = field(default_factory=Centre, init=False, compare=False, repr=False)

    requires: ClassVar[Requirement] = "distances"

    def __post_init__(self) -> None:
        self.coerce_float("radius")
        self.coerce_int("iterations", 1)
        check_per(self.per)

    @property
    def carries(self) -> Centre | None:
        """See `WeightRule.carries`."""
        return self.centre

    @property
    def weighs(self) -> bool:
        """See `Rule.weighs`: the mean of the clipped differences may be a weighted one."""
        return True

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def choose_none(self, space: GramSpace) -> Choice:
        """See `GramRule.choose_none`."""
        return replace(super().choose_none(space), iterations=0, clipped=space.n * torch.nan)

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        weights = torch.zeros_like(space.gram[-1])
        weights[-1] = 1
        distances = weights[:-1]
        for _ in range(self.iterations):
            distances = space.distances_to(weights)
            pull = (self.radius / distances).clamp(max=1) * space.shares
            weights = weights * (1 - pull.sum())
            weights[:-1] += pull
        clipped = ((distances > self.radius) & space.kept).sum() / space.n
        return Choice(weights[:-1], weights[-1], iterations=self.iterations, clipped=clipped)
