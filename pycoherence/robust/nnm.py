"""Nearest neighbour mixing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pycoherence.robust._mixing import Mixing
from pycoherence.robust._rule import Rule
from pycoherence.robust._space import GramSpace, Requirement


@dataclass(frozen=True)
class NNM(Mixing):
    r"""A rule applied to the mean of each example with its nearest neighbours.

    .. math:: g'_b = \frac{1}{B - f} \sum_{c \in N_b} g_c, \qquad
        N_b = \text{the } B - f \text{ examples nearest to } g_b, \ b \text{ among them}

    Examples then differ less, which is what robust rules need when honest ones disagree. Ties go to
    the earlier example. Any rule but `Reweight` may be inside; for one over whole examples the dot
    products of the mixtures follow from those of the examples, so that nothing is mixed in memory.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `weights`, those of
    the examples.

    Args:
        f: How many examples may be arbitrary.
        rule: The rule for the mixtures, such as `pc.TrimmedMean(f)`. Its `per` says whether the
            distances are those of whole gradients; for a rule over coordinates they are.

    Raises:
        TypeError: `f` is not an integer, or `rule` not a rule.
        ValueError: `f` is negative; from `backward()`, the batch has fewer than `f + 1` examples,
            or too few for the rule.

    Cost: That of `Krum` with the Gram matrix in float64, at two to four times its cost, and that of
        the rule. A rule over coordinates is applied to some coordinates at a time, as many as fit
        the workspace, where `2 B^2` operations mix each.

    Source: Allouah et al. 2023, arXiv:2302.01772.

    Example:
        >>> import torch, pycoherence as pc
        >>> vectors = torch.tensor([[1.0], [2.0], [4.0], [90.0]])
        >>> pc.NNM(1, pc.Median())(vectors)  # of 7/3, 7/3, 7/3 and 32
        tensor([2.3333])
    """

    f: int
    rule: Rule

    def __post_init__(self) -> None:
        self.coerce_int("f")
        super().__post_init__()

    @property
    def requires(self) -> Requirement:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Mixing.requires`; whether mixtures lie close together is not known before."""
        return "double"

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        if n < self.least:
            return f"needs a batch of f + 1 = {self.least} examples or more"
        return super().check_batch(n)

    @property
    def least(self) -> int:
        """See `GramRule.least`."""
        return self.f + 1

    def mix(self, space: GramSpace) -> Tensor:
        """See `Mixing.mix`."""
        examples = space.nearest_first[1]
        count = space.n - self.f
        first = (torch.arange(len(examples), device=examples.device) < count) / count
        mixing = torch.zeros_like(first.expand(examples.shape)).scatter(
            1, examples, first.expand(examples.shape)
        )
        return torch.where(space.kept[:, None], mixing, torch.nan)
