"""Bucketing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pycoherence.robust._mixing import Mixing
from pycoherence.robust._rule import Rule
from pycoherence.robust._space import GramSpace


@dataclass(frozen=True)
class Bucketing(Mixing):
    r"""A rule applied to the means of random buckets of examples.

    .. math:: g'_i = \frac{1}{s} \sum_{j = (i - 1) s + 1}^{\min(i s, B)} g_{\pi(j)}, \qquad
        i = 1, \dots, \lceil B / s \rceil

    with a new permutation for each batch. If `s` does not divide `B` the last bucket is smaller,
    and its mean is over what it has.

    Examples that `nonfinite="drop"` leaves out are missing in their buckets.

    Give it to `pycoherence.aggregate`, or call it on vectors. The report has `weights`, those of
    the examples.

    Args:
        size: `s`, how many examples a bucket has.
        rule: The rule for the means, such as `pc.CenteredClip(1.0)`. A bucket with one arbitrary
            example counts as arbitrary.
        generator: The source of the permutations, on the CPU; torch's own if `None`.

    Raises:
        TypeError: `size` is not an integer, `rule` not a rule, or the generator none on the CPU.
        ValueError: `size` is less than one; from `backward()`, there are too few buckets for the
            rule.

    Cost: That of `NNM`, without its distances.

    Source: Karimireddy et al. 2020, arXiv:2006.09365.

    Example:
        >>> import torch, pycoherence as pc
        >>> vectors = torch.tensor([[1.0], [2.0], [4.0], [6.0]])
        >>> pc.Bucketing(2, pc.TrimmedMean(0))(vectors)
        tensor([3.2500])
    """

    size: int
    rule: Rule
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.coerce_int("size", 1)
        generator = self.generator
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"expected a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise TypeError(f"expected a generator on the CPU, got one on {generator.device}")
        super().__post_init__()

    def points(self, n: int) -> int:
        """See `Mixing.points`."""
        return -(-n // self.size)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        why = super().check_batch(n)
        return None if why is None else f"makes {self.points(n)} buckets, and inside {why}"

    def mix(self, space: GramSpace) -> Tensor:
        """See `Mixing.mix`."""
        n = space.batch_size
        order = torch.randperm(n, generator=self.generator)
        buckets = (order // self.size).to(space.gram.device)
        found = torch.arange(self.points(n), device=buckets.device)[:, None] == buckets
        found = (found & space.kept).double()
        # An empty bucket is divided by zero, and so left out.
        return found / found.sum(1, keepdim=True)
