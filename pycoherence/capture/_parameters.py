"""Which parameters are measured."""

from torch import nn

from pycoherence.capture._compiled import expect_not_compiling
from pycoherence.capture._parallel import check_parallel


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
    check_parallel(model)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"expected a model with parameters that require a gradient, got "
            f"{type(model).__name__} without any; call requires_grad_() on those to measure"
        )
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise TypeError(f"expected real floating parameters, got {parameter.dtype} in {name!r}")
    return found
