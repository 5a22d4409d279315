"""Jacobian descent over examples: the Gramian for TorchJD's weightings, in one backward pass."""

from types import TracebackType

import torch
from torch import Tensor, nn

from pycoherence.capture import Capture, check_batch_norm, tracked_parameters
from pycoherence.record import Record, record_of
from pycoherence.statistics import Gram, combine

__all__ = ["Engine"]


class Engine:
    r"""The Gramian of the losses of single examples, and their weighted gradient.

    .. math:: K_{bc} = \langle \nabla \ell_b, \nabla \ell_c \rangle, \qquad
        \texttt{.grad} \mathrel{+}= \sum_b w_b \nabla \ell_b

    It does what `torchjd.autogram.Engine` does with `batch_dim=0` for one loss of each example, and
    what `losses.backward(weights)` does after it. The forward pass runs in a block of it::

        engine = Engine(model)
        with engine:
            losses = criterion(model(x), y)                   # [B], reduction="none"
        weights = weighting(engine.compute_gramian(losses))   # UPGradWeighting() or another
        engine.backward(weights)                              # not losses.backward(weights)

    It takes one backward pass in place of two, and no forward pass of each layer alone. Weights
    that several modules share, and those that are used without their module, are exact too.

    For weights that need no look at them, `pycoherence.aggregate` with
    `pycoherence.FromWeighting` does the same around an ordinary training step.

    Scaling: The losses are taken as they are, and `.grad` is the sum above, without a division.

    Args:
        modules: The module, or several, whose parameters count. Those with `requires_grad=False`
            are left alone.

    Raises:
        ValueError: No parameter to track; from `compute_gramian`, the losses are not one for each
            example.
        RuntimeError: The calls come in another order.
        UnsupportedError: See `pycoherence.collect`.

    Cost: A backward pass without weight gradients and the Gram matrix, then one weighted sum;
    memory of the inputs and output gradients of all layers, until `backward` has run.

    Source: Quinton and Rey 2024, arXiv:2406.16232.

    Example:
        >>> import torch
        >>> from pycoherence.integrations.torchjd import Engine
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> engine = Engine(model)
        >>> with engine:
        ...     losses = model(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).squeeze(1)
        >>> engine.compute_gramian(losses)
        tensor([[ 1.,  3.],
                [ 3., 25.]])
        >>> engine.backward(torch.tensor([1.0, 0.5]))
        >>> model.weight.grad
        tensor([[2.5000, 2.0000]])
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._model = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        tracked_parameters(self._model)  # so that modules without parameters raise here
        self._capture: Capture | None = None
        self._record: Record | None = None
        self._is_open = False

    def __enter__(self) -> "Engine":
        if self._is_open:
            raise RuntimeError("this engine's block is open already; leave it first")
        check_batch_norm(self._model)
        parameters = tracked_parameters(self._model)
        request = combine((Gram(),), parameters)._replace(
            sum_norms=False, factors=True, gradients=False, is_mean=False
        )
        capture = Capture(self._model, parameters, request)
        capture.__enter__()
        self._capture, self._is_open = capture, True
        self._record = record_of(capture, request, (Gram(),), "sum")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if kind is not None:
            self._capture = self._record = None

    def _close(self) -> None:
        if self._is_open and self._capture is not None:
            self._is_open = False
            self._capture.__exit__(None, None, None)

    def compute_gramian(self, losses: Tensor) -> Tensor:
        """The dot products of the losses' gradients.

        Args:
            losses: `[B]`, one of each example, from a forward pass in the block. Their graph is
                freed.

        Returns:
            `[B, B]`, float32, or float64 for models in float64.
        """
        capture, record = self._capture, self._record
        if capture is None or record is None:
            raise RuntimeError(
                "there is no forward pass to differentiate; run it in the block: `with engine:`, "
                "once for each call of compute_gramian"
            )
        self._close()
        size = capture.results.batch_size
        if losses.dim() != 1 or len(losses) != size:
            raise ValueError(
                f"expected one loss for each of {size} examples, [{size}], got shape "
                f"{tuple(losses.shape)}; for several of each example take torchjd.autogram.Engine, "
                'and for a scalar reduction="none"'
            )
        self._capture = None
        results = capture.results
        names = results.measured or [n for n in capture.parameters if n not in results.skipped]
        capture.measure(losses.sum(), [capture.passes.leaves[name] for name in sorted(names)])
        capture.forget()
        return record.gram

    def backward(self, weights: Tensor) -> None:
        """Add the weighted sum of the losses' gradients to `.grad`.

        Args:
            weights: `[B]`, floating, on the device of the Gramian.

        Raises:
            RuntimeError: No Gramian was computed since the last call.
            ValueError: The weights are not `[B]`.
            TypeError: They are not floating, or on another device.
        """
        record = self._record
        if record is None or self._capture is not None:
            raise RuntimeError("no Gramian was computed; call compute_gramian(losses) first")
        found = record.weighted_sum(weights.detach())
        self._record = None
        parameters = {n: p for n, p in tracked_parameters(self._model).items() if n in found}
        gradients = [found[name].to(p.dtype) for name, p in parameters.items()]
        torch.autograd.backward(list(parameters.values()), gradients)
