"""Norm clipping, with noise for differential privacy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.robust._gram_rule import GramRule
from pycoherence.robust._rule import Per, check_per
from pycoherence.robust._space import GramSpace, Requirement
from pycoherence.robust._weight_rule import Choice


@dataclass(frozen=True)
class NormClip(GramRule):
    r"""The mean of the examples' gradients, none longer than a maximum, and noise: DP-SGD.

    .. math:: \frac{1}{B} \Big( \sum_b g_b \min\Big(1, \frac{C}{\lVert g_b \rVert}\Big)
        + \mathcal{N}(0, \sigma^2 C^2 I) \Big)

    with the norm over all parameters of the network. This is the paper's formula; opacus adds 1e-6
    to the norm. Each parameter of the model gets its noise, also if it took no part.

    With `per="parameter"` each is clipped to `C` alone, so that an example may move the whole
    gradient by `C` times the square root of their number; the noise is then `sigma` times that.

    An example that `nonfinite="drop"` leaves out counts as zero here, and the divisor stays `B`.
    This does no accounting, and torch's generators are not cryptographic.

    If the loss is scaled or divided (`GradScaler`, `loss / 4`), say so with the `loss_scale` of
    `pycoherence.aggregate`; otherwise `C` means something else.

    Give it to `pycoherence.aggregate`. The report has `weights` and `clipped`, the fraction of
    examples beyond `C`.

    Args:
        max_norm: `C`, in the units of `||g_b||`.
        noise_multiplier: `sigma`.
        generator: The source of the noise, on the model's device; torch's own if `None`.
        per: Whether the norm is that of the whole gradient, or each parameter is clipped alone.

    Raises:
        TypeError: A number or the generator is not one.
        ValueError: `max_norm` is not positive, `noise_multiplier` negative, or `per` unknown.

    Cost: A backward pass without weight gradients, the squared norms, and one weighted sum; memory
    of the inputs and output gradients of all layers.

    Source: Abadi et al. 2016, arXiv:1607.00133.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> with pc.aggregate(model, pc.NormClip(1.0)) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad, agg.report.network.clipped
        (tensor([[0.3000, 0.6500]]), 0.5)
    """

    max_norm: float
    noise_multiplier: float = 0.0
    generator: torch.Generator | None = None
    per: Per = "network"

    requires: ClassVar[Requirement] = "sq_norms"

    def __post_init__(self) -> None:
        self.coerce_float("max_norm")
        self.coerce_float("noise_multiplier", positive=False)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"expected a torch.Generator, got {type(self.generator).__name__}")
        check_per(self.per)

    def check_batch(self, n: int) -> str | None:
        """See `Rule.check_batch`."""
        return None

    def choose(self, space: GramSpace) -> Choice:
        """See `GramRule.choose`."""
        norms = space.sq_norms.sqrt()
        weights = (self.max_norm / norms).clamp(max=1) / space.batch_size
        clipped = (norms > self.max_norm).double().sum() / space.batch_size
        return Choice(weights, clipped=clipped)

    def noise(self, parameter: Tensor, batch_size: int, parameters: int) -> Tensor | None:
        """See `WeightRule.noise`."""
        if not self.noise_multiplier:
            return None
        dtype, device = accumulate_dtype(parameter.dtype), parameter.device
        sample = torch.randn(parameter.shape, generator=self.generator, dtype=dtype, device=device)
        parts = parameters if self.per == "parameter" else 1
        return sample * (self.noise_multiplier * self.max_norm * parts**0.5 / max(batch_size, 1))
