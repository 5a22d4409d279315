"""Adaptive robust clipping."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pycoherence.robust._mixing import Mixing
from pycoherence.robust._rule import Rule, check_majority
from pycoherence.robust._space import GramSpace


@dataclass(frozen=True)
class ARC(Mixing):
    r"""A rule applied to the examples' gradients with the longest made shorter.

    .. math:: g'_b = g_b \min\Big(1, \frac{C}{\lVert g_b \rVert}\Big), \qquad
        C = \text{the } (k + 1) \text{-th largest norm}, \quad
        k = \Big\lfloor \frac{2 f (B - f)}{B} \Big\rfloor

    so that the `k` longest get the norm of the next. The authors apply it before `NNM`:
    `pc.ARC(f, pc.NNM(f, rule))`.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `weights`, those of
    the examples.

    Args:
        f: How many examples may be arbitrary; `2f < B`.
        rule: The rule for the clipped gradients. Its `per` says whether the norms are those of
            whole gradients; for a rule over coordinates they are.

    Raises:
        TypeError: `f` is not an integer, or `rule` not a rule.
        ValueError: `f` is negative; from `backward()`, the batch has fewer than `2f + 1` examples,
            or too few for the rule.

    Cost: That of `NNM`, without its distances.

    Source: Allouah et al. 2024, arXiv:2405.14432.

    Example:
        >>> import torch, pycoherence as pc
        >>> vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
        >>> pc.ARC(1, pc.TrimmedMean(0))(vectors)  # the mean of [1.2, 1.6], [0, 2] and [1, 0]
        tensor([0.7333, 1.2000])
    """

    f: int
    rule: Rule

    def __post_init__(self) -> None:
        self.coerce_int("f")
        super().__post_init__()

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return check_majority(self.f, n) or super().check_batch(n)

    @property
    def least(self) -> int:
        """See `GramRule.least`."""
        return 2 * self.f + 1

    def mix(self, space: GramSpace) -> Tensor:
        """See `Mixing.mix`."""
        norms = space.sq_norms.sqrt()
        # Those that are left out have the norm zero, and come last.
        longest = norms.sort(descending=True).values
        k = (2 * self.f * (space.n - self.f) / space.n).floor().nan_to_num().long()
        limit = longest.gather(0, k.clamp(0, len(norms) - 1)[None])
        factors = torch.where(norms > limit, limit / norms, 1.0)
        return torch.diag(torch.where(space.kept, factors, torch.nan)).masked_fill(
            ~torch.eye(len(norms), dtype=torch.bool, device=norms.device), 0
        )
