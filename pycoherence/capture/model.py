"""Which parameters of a model are measured, and which models cannot be."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pycoherence.capture.blocks import expect_not_compiling
from pycoherence.errors import UnsupportedError

MIXES = "batch statistics mix the examples, so that none has a gradient of its own"
USE_OTHERS = (
    "use GroupNorm or LayerNorm; only to measure, and not to train, put the model, or its "
    "BatchNorm layers, in eval mode"
)


Modules = list[tuple[str, nn.Module]]
"""All modules of a model and their paths."""


def modules_of(model: nn.Module) -> Modules:
    """All modules of a model and their paths, in the order of `named_modules`, in less time."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        ahead = path + "." if path else ""
        below = [(ahead + name, m) for name, m in module._modules.items() if m is not None]
        stack += reversed(below)
    return found


def trained_parameters(modules: Modules) -> dict[str, nn.Parameter]:
    """The parameters of modules that require a gradient, by name; each once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in modules:
        ahead = path + "." if path else ""
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                if p.requires_grad:
                    found[ahead + name] = p
    return found


def tracked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that require a gradient, by name.

    Raises:
        ValueError: There are none.
        TypeError: One is not a floating-point tensor, or this is no model.
        UnsupportedError: Its layers run in threads of their own.
        RuntimeError: This is being compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    expect_not_compiling()
    modules = modules_of(model)
    check_parallel(modules)
    found = trained_parameters(modules)
    if not found:
        raise ValueError(
            f"expected a model with parameters that require a gradient, got "
            f"{type(model).__name__} without any; call requires_grad_() on those to measure"
        )
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise TypeError(f"expected real floating parameters, got {parameter.dtype} in {name!r}")
    return found


def check_batch_norm(model: nn.Module) -> None:
    """Refuse a model with a BatchNorm layer that would use batch statistics.

    The guard of the function would, but only after the layer has counted the batch.

    Raises:
        UnsupportedError: There is such a layer.
    """
    for path, module in modules_of(model):
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            kind = type(module).__name__
            raise UnsupportedError(f"module {path!r} ({kind}): {MIXES}. What to do: {USE_OTHERS}.")


def check_parallel(modules: Modules) -> None:
    """Refuse modules whose layers run in threads of their own, which no mode sees.

    Raises:
        UnsupportedError: One is such a model.
    """
    for path, module in modules:
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            where = f"module {path!r}" if path else "the model itself"
            raise UnsupportedError(
                f"{where} (DataParallel): its layers run as copies, in threads where they are not "
                "seen. What to do: use torch.nn.parallel.DistributedDataParallel, which runs a "
                "process for each device, or put its .module on one device."
            )
