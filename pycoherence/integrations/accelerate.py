"""Per-example gradients in a loop of one's own with accelerate."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import accelerate
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from pycoherence.capture import check_scale
from pycoherence.integrations._losses import derivatives, edge_of, replaced
from pycoherence.integrations._refusals import check_version, refuse
from pycoherence.monitor import GradientMonitor
from pycoherence.record import LossReduction
from pycoherence.statistics import Statistic

__all__ = ["PerExampleMonitor"]


class PerExampleMonitor(GradientMonitor):
    r"""A `pycoherence.GradientMonitor` that knows by how much accelerate scales the loss.

    .. math:: g_b = B \cdot \nabla_w \frac{1}{B} \ell_b \ \text{(mean)}
        \qquad g_b = \nabla_w \ell_b \ \text{(sum)}

    for the loss that `accelerator.backward` is given. It divides that by
    `gradient_accumulation_steps`, and multiplies it by the scale of its `GradScaler`, both of which
    are undone. A loss on which `backward()` itself is called is taken as it is. A rule with
    `expected_batch_size`, which counts the examples of a whole step, divides by that alone.

    Args:
        accelerator: Whose loop it is.
        model: The model, before or after `accelerator.prepare`.
        statistics: The statistics to measure; `pc.SqNorms()` if none is given.
        options: Those of `pycoherence.GradientMonitor`; `log=accelerator` writes to its trackers.

    Raises:
        UnsupportedError: accelerate is older than 1.6; the accelerator compiles the model, or
            runs it by FSDP1, DeepSpeed or Megatron-LM; it has an optimizer that
            steps inside `backward()`. See `pycoherence.GradientMonitor` also.

    Cost: That of `pycoherence.GradientMonitor`; the scale waits for the device once in a
    micro-batch.

    Source: McCandlish et al. 2018, arXiv:1812.06162, for the noise scale; each statistic and rule
    names its own.

    Example:
        >>> import torch, pycoherence as pc
        >>> from accelerate import Accelerator
        >>> from pycoherence.integrations.accelerate import PerExampleMonitor
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> monitor = PerExampleMonitor(accelerator, model)
        >>> for part in torch.tensor([[1.0], [2.0], [3.0], [4.0]]).split(2):
        ...     with accelerator.accumulate(model):
        ...         with monitor.micro_batch():
        ...             accelerator.backward(model(part).mean())
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         scalars = monitor.step()
        >>> [record.sq_norms.tolist() for record in monitor.records]
        [[1.0, 4.0], [9.0, 16.0]]
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, *statistics: Statistic, **options: Any
    ) -> None:
        check_accelerator(accelerator)
        self._accelerator = accelerator
        super().__init__(accelerator.unwrap_model(model), *statistics, **options)

    @contextmanager
    def micro_batch(
        self,
        *,
        loss_scale: float = 1.0,
        loss_reduction: LossReduction | None = None,
        last: bool | None = None,
    ) -> Iterator[None]:
        """Run the forward pass and `accelerator.backward` of one micro-batch inside.

        Args:
            loss_scale: The number that the loss is multiplied by before it is given to
                `accelerator.backward`, such as `1 / tokens` for a sum over tokens.
            loss_reduction: That of this loss, if it is another than the monitor's.
            last: Whether the step has no other after it; `None` if the accelerator knows.

        Raises:
            RuntimeError: No backward pass of the model was seen in the block.
            UnsupportedError: `accelerator.backward` was called by a reference from before it.
        """
        own, losses = check_scale(loss_scale), list[GradientEdge]()
        accelerator = self._accelerator
        check_accelerator(accelerator)  # as prepare() may have come since
        backward = accelerator.backward

        def noted(loss: Tensor, **kwargs: Any) -> None:
            losses.append(edge_of(loss))
            backward(loss, **kwargs)

        def scale(root: Tensor) -> float:
            (factor,) = derivatives(root, losses[-1:]) or [None]
            scales = accelerator.gradient_accumulation_steps > 1 or accelerator.scaler is not None
            refuse(
                factor is None and scales and _is_running_backward(accelerator),
                "accelerator.backward was called by a reference from before the block, which does "
                "not show the loss before it is scaled",
                "write accelerator.backward(loss) in the block, and keep no `backward = "
                "accelerator.backward`",
            )
            return own if factor is None else own * factor

        with ExitStack() as stack:
            stack.callback(losses.clear)  # who holds a loss holds its graph
            stack.enter_context(replaced(accelerator, "backward", noted))
            stack.enter_context(
                super().micro_batch(
                    loss_scale=scale,
                    loss_reduction=loss_reduction,
                    last=accelerator.sync_gradients if last is None else last,
                    grad_scale=accelerator.scaler or 1.0,
                )
            )
            yield

    def step(self) -> dict[str, float] | None:
        """End a step if the accumulation is complete, as the optimizers of accelerate do.

        Returns:
            The scalars, as in `pycoherence.GradientMonitor`; `None` if the step goes on, or is not
            measured.
        """
        return super().step() if self._accelerator.sync_gradients else None


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what cannot be measured.

    Raises:
        UnsupportedError: See `PerExampleMonitor`.
    """
    check_version("accelerate", accelerate.__version__, "1.6")
    compiler: Any = accelerator.state.dynamo_plugin
    kind = accelerator.distributed_type
    refuse(
        compiler.backend.value != "NO",
        "the model is compiled by torch_compile or a dynamo backend, and in a block it would run "
        "as it was written",
        "leave the compiler out, or measure with pc.compile in a loop of your own",
    )
    refuse(
        kind == DistributedType.DEEPSPEED,
        "DeepSpeed runs backward passes of its own",
        "take DistributedDataParallel, by torchrun or accelerate launch without DeepSpeed",
    )
    refuse(
        kind == DistributedType.MEGATRON_LM,
        "Megatron-LM runs backward passes of its own",
        "take DistributedDataParallel, by torchrun or accelerate launch without Megatron-LM",
    )
    refuse(
        kind == DistributedType.FSDP and not accelerator.is_fsdp2,
        "FSDP1 flattens the parameters",
        "take FSDP2 (fsdp_version: 2) or DistributedDataParallel",
    )
    refuse(
        accelerator.has_lomo_optimizer,
        "a LOMO optimizer steps inside backward()",
        "take an optimizer that steps after it",
    )


def _is_running_backward(accelerator: Accelerator) -> bool:
    """Whether its `backward`, by whatever name, is among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is Accelerator.backward.__code__ and frame.f_locals["self"] is accelerator:
            return True
        frame = frame.f_back
    return False
