"""What a backward pass left behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pycoherence.capture import Capture
from pycoherence.statistics import Coherence

LossReduction = Literal["mean", "sum"]


def check_loss_reduction(value: str) -> None:
    """Raise `ValueError` unless it is one of `LossReduction`."""
    if value not in get_args(LossReduction):
        raise ValueError(f"expected loss_reduction to be 'mean' or 'sum', got {value!r}")


@dataclass(frozen=True)
class ParameterRecord:
    """The statistics of one parameter.

    Attributes:
        sq_norms: `[B]`, squared norms of the per-example gradients of this parameter.
    """

    sq_norms: Tensor


class Record:
    """The statistics of one backward pass; what `pycoherence.collect` gives.

    Results can be read as soon as `backward()` has run in the block. They are scaled so that `g_b`
    is the gradient of example b's own loss, as `loss_reduction` says.
    """

    def __init__(self, capture: Capture, loss_reduction: LossReduction) -> None:
        self._capture = capture
        self._loss_reduction = loss_reduction

    def __repr__(self) -> str:
        size, n = self._capture.batch_size, len(self._capture.parameters)
        return f"Record(batch_size={size}, parameters={n}, loss_reduction={self._loss_reduction!r})"

    @property
    def batch_size(self) -> int:
        """`B`, the number of examples.

        Raises:
            RuntimeError: No parameter has been used yet.
        """
        size = self._capture.batch_size
        if size is None:
            raise RuntimeError(
                "no parameter of the model was used in the block with gradients enabled; run "
                "model(x) and loss.backward() inside it"
            )
        return size

    @property
    def sq_norms(self) -> Tensor:
        """Squared norms over all tracked parameters, `[B]`."""
        per_parameter = [one.sq_norms for one in self.by_parameter.values()]
        device = per_parameter[0].device
        return torch.stack([x.to(device) for x in per_parameter]).sum(0)

    @property
    def by_parameter(self) -> Mapping[str, ParameterRecord]:
        """The statistics of each tracked parameter, by name; zeros where it did not take part."""
        scale = self._share_to_example() ** 2
        values = self._read("sq_norms")
        return {name: ParameterRecord(value * scale) for name, value in values.items()}

    def coherence(self) -> Coherence:
        r"""The coherence of the batch at the weights of this pass.

        .. math:: m = \lVert \sum_b g_b \rVert^2 / \sum_b \lVert g_b \rVert^2

        Returns:
            A `Coherence`, with parts by parameter and by module.

        Raises:
            RuntimeError: No backward pass has run.

        Source: Chatterjee and Zielinski 2022, arXiv:2203.10036.
        """
        scale = self._share_to_example() ** 2
        sums, totals = self._read("sum_sq_norm"), self._read("sq_norms")
        parts = {
            name: (sums[name].double().item() * scale, totals[name].double().sum().item() * scale)
            for name in sums
        }
        return Coherence.of(parts, self.batch_size)

    def _share_to_example(self) -> int:
        return self.batch_size if self._loss_reduction == "mean" else 1

    def _read(self, output: str) -> dict[str, Tensor]:
        """The gradients of one output's probes, by parameter; zeros for those that took no part."""
        size = self.batch_size
        probes = {name: self._capture.probe(name, output) for name in self._capture.parameters}
        if self._capture.watch.failed:
            raise RuntimeError(
                f"a backward pass on this batch of {size} raised an error before its end, so that "
                "its statistics are not complete; run forward and backward pass in a new block"
            )
        if all(probe.grad is None for probe in probes.values()):
            raise RuntimeError(
                f"no backward pass has run on this batch of {size}; call "
                "loss.backward() in the block first"
            )
        return {
            name: torch.zeros_like(probe) if probe.grad is None else probe.grad.detach().clone()
            for name, probe in probes.items()
        }
