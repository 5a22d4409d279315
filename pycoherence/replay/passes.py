"""One pass of the capture, and all that comes out of it as tensors and plain data."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycoherence.aggregate import aggregate
from pycoherence.capture import LossFn, Results, tracked_parameters
from pycoherence.capture.results import ParameterInfo
from pycoherence.collect import collect
from pycoherence.robust import Choice, CoordinateRule, Rule
from pycoherence.statistics import Statistic

Tree = dict[str, Any]
"""Nested dictionaries of tensors and plain data."""


class Pass(NamedTuple):
    """A forward and backward pass in a block of `collect` or `aggregate`.

    Attributes:
        model: The model.
        loss_fn: `loss_fn(model, batch)`.
        statistics: The statistics of the block.
        rule: The rule of `aggregate`, or none.
        options: Further options of the block.
    """

    model: nn.Module
    loss_fn: LossFn
    statistics: tuple[Statistic, ...]
    rule: Rule | None
    options: Mapping[str, Any]

    def block(self, loss_scale: float) -> "collect | aggregate":
        """A new block."""
        options = {**self.options, "loss_scale": loss_scale}
        if self.rule is None:
            options.pop("nonfinite", None)
            return collect(self.model, *self.statistics, **options)
        return aggregate(self.model, self.rule, *self.statistics, **options)

    @property
    def scale_is_input(self) -> bool:
        """Whether the scale of the loss may change from pass to pass.

        A rule over whole examples computes with it.
        """
        return self.rule is None or isinstance(self.rule, CoordinateRule)

    def run(self, batch: Any, scale: Tensor | float | None) -> Tree:
        """Run the pass, whose gradients are left in `.grad`, and give what it found.

        Args:
            batch: The second argument of `loss_fn`.
            scale: The number that the loss is multiplied by; `None` for none.

        Raises:
            ValueError: The loss is not a scalar tensor.
        """
        number = scale if isinstance(scale, float) else 1.0
        block = self.block(number)
        with torch.enable_grad(), block:
            loss = self.loss_fn(self.model, batch)
            _check_loss(loss)
            by = scale.to(loss.dtype) if isinstance(scale, Tensor) else scale
            (loss if by is None else loss * by).backward()
        return {"loss": loss.detach(), "gradients": self._gradients(), **_found(block)}

    def _gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in tracked_parameters(self.model).items()}
        return {name: g for name, g in found.items() if g is not None}


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"expected loss_fn to return a scalar tensor, got {got}")


def _found(block: "collect | aggregate") -> Tree:
    results = block.capture.results
    chosen = block.choices if isinstance(block, aggregate) else {}
    distinct = list({id(choice): choice for choice in chosen.values()}.values())
    return {
        "outputs": results.outputs,
        "sum_norms": results.sum_norms,
        "aggregated": results.aggregated,
        "choices": [
            {f.name: getattr(choice, f.name) for f in fields(choice)} for choice in distinct
        ],
        "results": {
            "choice_of": {name: distinct.index(choice) for name, choice in chosen.items()},
            "batch_size": results.batch_size,
            "skipped": list(results.skipped),
            "fallbacks": dict(results.fallbacks),
            "measured": sorted(results.measured),
            "parameters": {
                name: (tuple(info.shape), info.dtype, info.device)
                for name, info in results.parameters.items()
            },
        },
    }


def results_of(tree: Tree, loss_scale: float) -> Results:
    """The results of a block, from what a pass found."""
    plain = tree["results"]
    return Results(
        {name: ParameterInfo(*info) for name, info in plain["parameters"].items()},
        batch_size=plain["batch_size"],
        outputs=tree["outputs"],
        sum_norms=tree["sum_norms"],
        aggregated=tree["aggregated"],
        skipped=list(plain["skipped"]),
        fallbacks=dict(plain["fallbacks"]),
        loss_scale=loss_scale,
        measured=set(plain["measured"]),
        loss=tree["loss"],
    )


def choices_of(tree: Tree) -> dict[str, Choice]:
    """The choices of a rule over whole examples, from what a pass found."""
    distinct = [Choice(**each) for each in tree["choices"]]
    return {name: distinct[i] for name, i in tree["results"]["choice_of"].items()}


__all__ = ["Pass", "Tree", "choices_of", "results_of"]
