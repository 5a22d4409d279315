"""`torch.nn.functional.batch_norm`: refused in training, an affine map in evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pycoherence.capture._affine import Affine, check_channels
from pycoherence.capture._capture import Capture
from pycoherence.capture._registry import register_guard, register_site
from pycoherence.errors import UnsupportedError

_WHY = "batch statistics mix the examples, so that none has a gradient of its own"
_FIX = (
    "use GroupNorm or LayerNorm; only to measure, and not to train, put the model, or its "
    "BatchNorm layers, in eval mode"
)


def check_batch_norm(model: nn.Module) -> None:
    """Refuse a model with a BatchNorm layer that would use batch statistics.

    The guards below would, but only after the layer has counted the batch.

    Raises:
        UnsupportedError: There is such a layer.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            kind = type(module).__name__
            raise UnsupportedError(f"module {path!r} ({kind}): {_WHY}. What to do: {_FIX}.")


@register_guard(F.batch_norm)
def refuse_batch_statistics(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if training:
        capture.refuse(_WHY, _FIX)


@register_guard(torch.batch_norm)
@register_guard(torch.native_batch_norm)
def refuse_batch_statistics_of_torch(
    capture: Capture,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *options: object,
) -> None:
    refuse_batch_statistics(capture, input, running_mean, running_var, weight, bias, training)


@register_site(F.batch_norm)
def batch_norm(
    capture: Capture,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    check_channels(capture, input, weight, bias)
    call = capture.call(input, weight=weight, bias=bias)
    normal = F.batch_norm(input, running_mean, running_var, eps=eps)
    return Affine.apply(call, normal, weight, bias, *call.probes)
