"""What a backward pass left behind."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from pycoherence.capture import BACKWARDS, Capture
from pycoherence.errors import UnsupportedError
from pycoherence.statistics import Coherence

LossReduction = Literal["mean", "sum"]


def check_loss_reduction(value: str) -> None:
    """Raise `ValueError` unless it is one of `LossReduction`."""
    if value not in get_args(LossReduction):
        raise ValueError(f"expected loss_reduction to be 'mean' or 'sum', got {value!r}")


class GradientWatch:
    """Notices a gradient that reached a parameter without passing through the capture."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._before = {name: _state(p.grad) for name, p in capture.parameters.items()}

    def check(self) -> None:
        """Check every tracked parameter that the capture has not seen in use.

        Raises:
            UnsupportedError: One has received a gradient all the same.
        """
        for name, parameter in self._capture.parameters.items():
            grad = parameter.grad
            if name in self._capture.probes or grad is None or _same(grad, self._before[name]):
                continue
            # Zeroing a stale gradient in place changes it too, without any backward.
            if grad.count_nonzero() > 0:
                raise UnsupportedError(bypassed(name))


def bypassed(name: str) -> str:
    """The message about a gradient that the capture knows nothing of."""
    return (
        f"parameter {name!r} received a gradient, but no use of it was seen: its forward pass ran "
        "outside the block, in a custom autograd.Function or in scripted code. What to do: run the "
        "forward pass inside the block, write the layer with functions of torch.nn.functional, or "
        "freeze the parameter with requires_grad_(False)."
    )


def _state(grad: Tensor | None) -> tuple[weakref.ref[Tensor], int] | None:
    return None if grad is None else (weakref.ref(grad), grad._version)


def _same(grad: Tensor, before: tuple[weakref.ref[Tensor], int] | None) -> bool:
    return before is not None and before[0]() is grad and before[1] == grad._version


@dataclass(frozen=True)
class ParameterRecord:
    """The statistics of one parameter.

    Attributes:
        sq_norms: `[B]`, squared norms of the per-example gradients of this parameter.
    """

    sq_norms: Tensor


class Record:
    """The statistics of one backward pass; what `pycoherence.collect` gives.

    Results can be read once `backward()` has run, inside the block or after it. They are scaled so
    that `g_b` is the gradient of example b's own loss, as `loss_reduction` says.
    """

    def __init__(
        self, capture: Capture, watch: GradientWatch, loss_reduction: LossReduction
    ) -> None:
        self._capture = capture
        self._watch = watch
        self._loss_reduction = loss_reduction

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
        self._check()
        found: dict[str, Tensor] = {}
        for name in self._capture.parameters:
            probe = self._capture.probe(name, output)
            found[name] = torch.zeros_like(probe) if probe.grad is None else probe.grad.clone()
        return found

    def _check(self) -> None:
        """Raise unless exactly one backward pass has run and all it reached was captured."""
        batch = self.batch_size
        self._watch.check()
        runs = [probes[BACKWARDS].grad for probes in self._capture.probes.values()]
        counts = [0 if run is None else int(run) for run in runs]
        if max(counts) == 0:
            raise RuntimeError(
                f"no backward pass has run on this batch of {batch}; call loss.backward() first"
            )
        if max(counts) > 1:
            raise RuntimeError(
                f"expected one backward pass, got {max(counts)} through the same graph; use a "
                "collect block of its own for each"
            )
