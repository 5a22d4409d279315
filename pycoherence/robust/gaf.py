"""Gradient agreement filtering."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pycoherence.ops.gram_filter import gram_filter
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class GAF(GramRule):
    r"""A running average that takes in only the gradients which point its way.

    .. math:: G \leftarrow g_1, \qquad G \leftarrow \tfrac12 (G + g_b) \
        \text{ if } \ 1 - \cos(G, g_b) \le \tau, \ \text{ for } b = 2, \dots, B

    as in the authors' code: the average halves what was there before, so that the order of the
    examples matters and the last that agree weigh most. If no example agrees with the first, there
    is no step: the gradient is zero. The cosine with a gradient that vanishes is taken as zero.

    The authors compare micro-batches, and this compares examples, which agree less.

    Give it to `pycoherence.aggregate`. The report has `chosen`, the examples taken in, and
    `weights`.

    Args:
        threshold: `tau`, from 0 to 2; the authors advise 0.9 to 1.
        per: Whether the cosine is that of whole gradients, or each parameter is filtered alone.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: It is not in this range, or `per` is unknown.

    Cost: A backward pass without weight gradients, the Gram matrix, and one weighted sum; memory of
    the inputs and output gradients of all layers.

    Source: Chaubard et al. 2024, arXiv:2412.18052.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [2.0, 1.0]])
        >>> with pc.aggregate(model, pc.GAF(0.9)) as agg:
        ...     model(x).mean().backward()
        >>> agg.report.network.chosen, model.weight.grad
        (tensor([0, 3]), tensor([[3.0000, 0.5000]]))
    """

    threshold: float
    per: Per = "network"

    requires: ClassVar[Requirement] = "gram"

    def __post_init__(self) -> None:
        self.coerce_float("threshold", positive=False)
        if self.threshold > 2:
            raise ValueError(f"expected a threshold from 0 to 2, got {self.threshold}")
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        weights, taken = gram_filter(space.gram, space.kept, self.threshold)
        indices = torch.arange(space.batch_size, device=weights.device)
        return Choice(weights, chosen=torch.where(taken > 0, indices, -1))
