"""Weights for whole examples, from the statistics of the same pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycoherence.robust._rule import Per, Report
from pycoherence.robust._vectors import Stack
from pycoherence.robust._weight_rule import WeightRule


@dataclass(frozen=True)
class Reweight(WeightRule):
    r"""The mean of the examples' gradients, each times a coefficient of your own.

    .. math:: \frac{1}{B} \sum_b c_b g_b

    A function makes the coefficients of the record of this very pass, so that examples are dropped
    or weighed down in one line. A coefficient of 1 leaves an example as it is, and an example of
    coefficient 0 is left out, even if its gradient is not finite. The divisor stays `B`: for a
    weighted mean divide `c` by its mean.

    Give it to `pycoherence.aggregate` together with the statistics that the function reads. The
    report has `weights`, `c / B`.

    Args:
        function: `function(record)` gives `c`, `[B]`, floating, integer or bool, on any device;
            `record` is a `pycoherence.Record`, with `group` that of the examples of all processes.

    Raises:
        TypeError: The function is not callable, or from `backward()`, gives no tensor of numbers.
        ValueError: From `backward()`, it does not give one coefficient for each example.

    Cost: A backward pass with the statistics, in which no weight gradient is made unless the
    coherence needs one, and one weighted sum; memory of the inputs and output gradients of all
    layers.

    Source: Ren et al. 2018, arXiv:1803.09050, for learning with coefficients of examples.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [1000.0]])
        >>> rule = pc.Reweight(lambda record: record.sq_norms < 100)
        >>> with pc.aggregate(model, rule, pc.SqNorms()) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad, agg.report.network.weights
        (tensor([[1.5000]]), tensor([0.2500, 0.2500, 0.2500, 0.0000], dtype=torch.float64))
    """

    function: Callable[[Any], Tensor]

    per: Per = field(default="network", init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"expected a function of the record, got {self.function!r}")

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def combine(
        self, stack: Stack, weights: Tensor | None, drop: bool, outvoted: bool
    ) -> tuple[dict[str, Tensor], Report]:
        """See `Rule.combine`: vectors have no record."""
        raise TypeError(
            f"{self} reads the record of a backward pass, which vectors without a model do not "
            "have; give it to pycoherence.aggregate, or weigh the vectors yourself"
        )

    def weigh(self, record: Any, n: int, device: torch.device) -> Tensor:
        """The coefficients of `n` examples over their number, `[B]`, float64.

        Args:
            record: The argument of the function.
            n: `B`.
            device: The device of the gradients.
        """
        coef = self.function(record)
        if not isinstance(coef, Tensor) or coef.is_complex():
            got = coef.dtype if isinstance(coef, Tensor) else type(coef).__name__
            raise TypeError(f"expected the function of {self} to give a real tensor, got {got}")
        if tuple(coef.shape) != (n,):
            raise ValueError(
                f"expected the function of {self} to give one coefficient for each of {n} "
                f"examples, got shape {tuple(coef.shape)}"
            )
        return coef.detach().to(device, torch.float64) / max(n, 1)
