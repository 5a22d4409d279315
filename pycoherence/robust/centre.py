"""The centre that is carried from one batch to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.sites import gathered


class Centre:
    """The point that `CenteredClip` clips around, which each batch moves.

    It belongs to its rule (`rule.centre`), so use one rule object for all steps, and another one
    for another model. It starts at zero.

    Attributes:
        value: By parameter, in float32 (float64 for float64 models), of the scale of a mean of
            `g_b`; parameters left out are zero.
    """

    def __init__(self) -> None:
        self.value: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"Centre(parameters={len(self.value)})"

    def reset(self) -> None:
        """Start at zero again."""
        self.value = {}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy, for a checkpoint."""
        return {name: v.clone() for name, v in self.value.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace it by what `state_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        wrong = [repr(name) for name, v in state.items() if not isinstance(v, Tensor)]
        if wrong:
            raise ValueError(
                "expected what rule.centre.state_dict() gave, a tensor for each parameter, got "
                f"something else for {', '.join(wrong)}"
            )
        self.value = {name: v.clone() for name, v in state.items()}

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` unless it fits these parameters; move it to their devices."""
        unfit = sorted(
            name
            for name, v in self.value.items()
            if name not in parameters or parameters[name].shape != v.shape
        )
        if unfit:
            raise ValueError(
                "expected the centre of a rule used with this model, got one that differs in "
                f"{', '.join(unfit)}; use a rule for each model, or call rule.centre.reset()"
            )
        self.value = {
            name: v.to(parameters[name].device, accumulate_dtype(parameters[name].dtype))
            for name, v in self.value.items()
        }

    def move(self, value: Mapping[str, Tensor]) -> None:
        """Carry a new value on; one that is not finite would never leave, so it does not count."""
        finite = [gathered(torch.isfinite(v).all()) for v in value.values()]
        counts = torch.stack([x.to(finite[0].device) for x in finite]).all()
        self.value = {
            name: torch.where(counts.to(v.device), v, self.value.get(name, 0.0))
            for name, v in value.items()
        }
