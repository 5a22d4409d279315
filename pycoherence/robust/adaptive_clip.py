"""Norm clipping whose threshold follows a quantile of the norms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pycoherence.robust._clipping import Limit
from pycoherence.robust._rule import State, groups_of
from pycoherence.robust._weight_rule import Done
from pycoherence.robust.norm_clip import NormClip
from pycoherence.robust.threshold import Threshold


@dataclass(frozen=True)
class AdaptiveClip(NormClip):
    r"""`NormClip` with a threshold that moves towards a quantile of the examples' norms.

    .. math:: C \leftarrow C \exp\big( -\eta (\tilde b - q) \big), \qquad
        \tilde b = \frac12 + \frac1n \Big( \sum_b \big( [\lVert g_b \rVert \le C] - \tfrac12 \big)
        + \mathcal{N}(0, \sigma_b^2) \Big)

    after each step, so that about the share `q` of the examples is left as it is. A step of several
    batches, by `last=False`, moves it once, by the examples of all.

    With noise, the threshold tells about the examples too. It takes a part of the
    `noise_multiplier` that the accounting knows, `sigma`, and the gradients get the noise of

    .. math:: \sigma_\Delta = \big( \sigma^{-2} - m (2 \sigma_b)^{-2} \big)^{-1/2}

    times `C`, for `m` groups of `per`, each with a threshold of its own. Account for `sigma`.

    State: the threshold belongs to this object, as its attribute `threshold` (a `Threshold`). Use
    one rule object for all steps of a training run; put `rule.state_dict()` into checkpoints.

    Everything else is as with `NormClip`. Give it to `pycoherence.aggregate`. The report has
    `weights` and `clipped`, the fraction of examples beyond the threshold.

    Args:
        max_norm: The threshold at first; or one for each group, by its name in `per`. One that is
            much too small or large needs `log(C / max_norm) / learning_rate` steps and more.
        noise_multiplier: `sigma`.
        generator: The source of the noise, as for `NormClip`.
        per: Whether the norm is that of the whole gradient, of each parameter, or of groups.
        expected_batch_size: `n`, the examples of a step to be expected. Noise requires it.
        quantile: `q`, the share of examples to be left as they are.
        learning_rate: `eta`.
        count_noise: `sigma_b`, in examples; with noise `n / 20` if `None`, as in the paper, and
            otherwise zero.

    Raises:
        TypeError: See `NormClip`.
        ValueError: See `NormClip`; `quantile` is not from 0 to 1, `learning_rate` not positive,
            noise is asked for without `expected_batch_size`, or `count_noise` is so small that
            nothing of `sigma` is left for the gradients.
        RuntimeError: See `NormClip`.

    Cost: That of `NormClip`, and one number more to send with `group`.

    Source: Andrew et al. 2021, arXiv:1905.03871.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1000.0]])
        >>> rule = pc.AdaptiveClip(0.1)
        >>> for _ in range(40):
        ...     with pc.aggregate(model, rule):
        ...         model(x).mean().backward()
        >>> 2 < rule.threshold.value["network"] < 4
        tensor(True)
    """

    quantile: float = field(default=0.5, kw_only=True)
    learning_rate: float = field(default=0.2, kw_only=True)
    count_noise: float | None = field(default=None, kw_only=True)
    threshold: Threshold = field(default_factory=Threshold, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coerce_float("quantile", positive=False)
        self.coerce_float("learning_rate")
        if self.quantile > 1:
            raise ValueError(f"expected a quantile from 0 to 1, got {self.quantile}")
        if self.noise_multiplier and self.expected_batch_size is None:
            raise ValueError(
                "expected expected_batch_size with noise, by which counts of examples are divided"
            )
        if self.count_noise is None:
            expected = self.expected_batch_size if self.noise_multiplier else None
            object.__setattr__(self, "count_noise", 0.0 if expected is None else expected / 20)
        self.coerce_float("count_noise", positive=False)
        self.noise_of(1)

    @property
    def states(self) -> Mapping[str, State]:
        """See `Rule.states`."""
        return {"threshold": self.threshold}

    def limit(self, group: str) -> Limit:
        """See `Clipping.limit`."""
        found = self.threshold.value.get(group)
        return super().limit(group) if found is None else found

    def noise_of(self, groups: int) -> float:
        """See `Clipping.noise_of`."""
        if not self.noise_multiplier:
            return 0.0
        spent = groups / (2 * self.count_noise) ** 2 if self.count_noise else torch.inf
        left = self.noise_multiplier**-2 - spent
        if left <= 0:
            least = self.noise_multiplier * groups**0.5 / 2
            raise ValueError(
                f"expected count_noise above {least:.3g}, so that noise_multiplier="
                f"{self.noise_multiplier} covers the thresholds of {groups} groups too, got "
                f"{self.count_noise}; raise it, or expected_batch_size, whose twentieth it is"
            )
        return left**-0.5

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """See `WeightRule.check_parameters`."""
        super().check_parameters(parameters)
        groups = groups_of(self.per, parameters)
        self.noise_of(len(groups))
        other = [group for group in self.threshold.value if group not in groups]
        if other:
            raise ValueError(
                f"expected the threshold of a rule used with this model, got one for "
                f"{', '.join(other)}; use a rule for each model, or call rule.threshold.reset()"
            )

    def end(self, batch: Done) -> None:
        """See `WeightRule.end`."""
        super().end(batch)
        n = float(batch.size)
        # Gradients of a group that took no part are zero, and so inside.
        inside: dict[str, Tensor | float] = dict.fromkeys(batch.groups, n)
        for group, choice in batch.choices.items():
            if batch.size and choice.clipped is not None:
                inside[group] = n * (1 - choice.clipped)
        self.threshold.count(inside, batch.size)
        if batch.last:
            device = next(iter(batch.choices.values())).weights.device
            self._move(device, batch.decided)

    def _move(self, device: torch.device, decided: Callable[[Tensor], Tensor]) -> None:
        counts, seen = self.threshold.take()
        n = self.expected_batch_size if self.expected_batch_size is not None else seen
        if not n:
            return
        for group, inside in counts.items():
            centred = torch.as_tensor(inside, dtype=torch.float64, device=device) - seen / 2
            if self.count_noise:
                noise = self.normal((), torch.float64, device) * self.count_noise
                centred = centred + decided(noise)
            share = centred / n + 0.5
            step = (-self.learning_rate * (share - self.quantile)).exp()
            self.threshold.value[group] = self.limit(group) * step
