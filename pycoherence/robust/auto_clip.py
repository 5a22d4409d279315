"""Automatic clipping: every gradient has about the same length."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pycoherence.robust._clipping import Clipping, Limit


@dataclass(frozen=True)
class AutoClip(Clipping):
    r"""The mean of the examples' gradients over their norms, and noise: AUTO-S.

    .. math:: \frac{1}{n} \Big( \sum_b g_b \frac{C}{\lVert g_b \rVert + \gamma}
        + \mathcal{N}(0, \sigma^2 C^2 I) \Big)

    in place of `NormClip`, whose threshold has to be tuned: here `C` only scales the step, which
    the learning rate does as well. It is 1 in the paper. `gamma` keeps small gradients small.

    Everything else is as with `NormClip`: `n`, batches of one step, groups, sources of noise, the
    `loss_scale`, and what it does not do: accounting.

    Give it to `pycoherence.aggregate`. The report has `weights`.

    Args:
        max_norm: `C`; or one for each group, by its name in `per`.
        noise_multiplier: `sigma`.
        generator: The source of the noise, as for `NormClip`.
        per: Whether the norm is that of the whole gradient, of each parameter, or of groups.
        expected_batch_size: The examples of a step to be expected, by which its sum is divided.
        gamma: The stability constant, in the units of `||g_b||`.

    Raises:
        TypeError: See `NormClip`.
        ValueError: See `NormClip`; `gamma` is not positive.
        RuntimeError: See `NormClip`.

    Cost: That of `NormClip`.

    Source: Bu et al. 2023, arXiv:2206.07136.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.99]])
        >>> with pc.aggregate(model, pc.AutoClip()):
        ...     model(x).mean().backward()
        >>> model.weight.grad
        tensor([[0.2994, 0.8942]])
    """

    max_norm: float | Mapping[str, float] = 1.0
    gamma: float = field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coerce_float("gamma")

    def multipliers(self, norms: Tensor, limit: Limit) -> Tensor:
        """See `Clipping.multipliers`."""
        return limit / (norms + self.gamma)

    def clipped(self, norms: Tensor, limit: Limit) -> Tensor | None:
        """See `Clipping.clipped`: all are, more or less."""
        return None
