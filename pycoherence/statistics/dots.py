"""Dot products of per-example gradients with a direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pycoherence.capture import Shape, per_example
from pycoherence.statistics._statistic import Batch, Raw, Statistic


@dataclass(frozen=True, eq=False)
class Dots(Statistic):
    r"""Dot products of the per-example gradients with a direction, per parameter and in total.

    .. math:: d_b = \langle g_b, v \rangle, \qquad
        d_b = \Big\langle g_b, \frac{1}{B} \sum_c g_c \Big\rangle \ \text{for "mean"}

    Ask for it in `pycoherence.collect`; the record then has `dots`, `[B]`, in float32 (float64 for
    float64 models).

    Scaling: `g_b` is the gradient of example b's own loss, as `loss_reduction` says; a direction is
    taken as it is.

    Args:
        direction: A tensor like each parameter that requires a gradient, by its name in
            `model.named_parameters()`, floating, on its device; or `"mean"`, the mean of the
            batch's own `g_b`. Tensors are read in the backward pass, so leave them alone until it
            has run.

    Raises:
        TypeError: The direction is neither a mapping nor `"mean"`; from `collect`, a tensor is not
            floating or on another device.
        ValueError: It is another string; from `collect`, names are missing or unknown, or a shape
            is not that of the parameter.

    Cost: For each parameter, one fused reduction in place of its ordinary gradient; `"mean"` needs
    the gradients twice, or `O(B^2)` more.

    Source: Pruthi et al. 2020, arXiv:2002.08484, for the influence of an example along a direction.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> direction = {"weight": torch.tensor([[3.0, 1.0]])}
        >>> with pc.collect(model, pc.Dots(direction), loss_reduction="sum") as record:
        ...     model(x).sum().backward()
        >>> record.dots
        tensor([3., 5.])
    """

    direction: Mapping[str, Tensor] | Literal["mean"]

    results: ClassVar[tuple[str, ...]] = ("dots",)

    def __post_init__(self) -> None:
        expected = 'expected a direction for each parameter, a dict of tensors, or "mean"'
        if isinstance(self.direction, str):
            if self.direction != "mean":
                raise ValueError(f"{expected}, got {self.direction!r}")
        elif not isinstance(self.direction, Mapping):
            raise TypeError(f"{expected}, got {type(self.direction).__name__}")

    @property
    def outputs(self) -> Mapping[str, Shape]:
        """See `Statistic.outputs`."""
        return {"sum_dots" if isinstance(self.direction, str) else "dots": per_example}

    def directions(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Statistic.directions`."""
        if isinstance(self.direction, str):
            return {}
        unknown = sorted(self.direction.keys() - parameters.keys())
        missing = sorted(parameters.keys() - self.direction.keys())
        if unknown:
            raise ValueError(
                "expected a direction for parameters that require a gradient, got one for "
                f"{unknown}, which are frozen or not in the model; leave them out"
            )
        if missing:
            raise ValueError(
                "expected a direction for each parameter that requires a gradient, got none for "
                f"{missing}; give zeros for those that are not to count"
            )
        for name, value in self.direction.items():
            _check(name, value, parameters[name])
        return {name: value.detach() for name, value in self.direction.items()}

    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """See `Statistic.read`."""
        if isinstance(self.direction, str):
            return raw["sum_dots"] * (batch.share**2 / max(batch.size, 1))
        return raw["dots"] * batch.share


def _check(name: str, value: Tensor, parameter: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected the direction of {name!r} to be a tensor, got {value!r}; where a parameter "
            "took no part and has no .grad, give torch.zeros_like(parameter)"
        )
    if value.shape != parameter.shape:
        raise ValueError(
            f"expected the direction of {name!r} to have its shape {tuple(parameter.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if not value.is_floating_point() or value.device != parameter.device:
        raise TypeError(
            f"expected the direction of {name!r} to be floating on {parameter.device}, got "
            f"{value.dtype} on {value.device}"
        )
