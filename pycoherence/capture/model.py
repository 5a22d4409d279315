"""Which parameters of a model are measured, and which models cannot be."""

import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pycoherence.capture.blocks import expect_not_compiling
from pycoherence.capture.torch_internals import fully_sharded, is_in_pipeline
from pycoherence.capture.unsharded import sharded
from pycoherence.errors import UnsupportedError

MIXES = "batch statistics mix the examples, so that none has a gradient of its own"
USE_OTHERS = (
    "use GroupNorm or LayerNorm, which pc.replace_batch_norm(model) puts in its place; only to "
    "measure, and not to train, put the model, or its BatchNorm layers, in eval mode"
)


Modules = list[tuple[str, nn.Module]]
"""All modules of a model and their paths."""


class _Walk(NamedTuple):
    """A walk of the modules of a model, which keeps none of them alive.

    Attributes:
        model: The root.
        paths: The paths of the modules, in the order of `named_modules`.
        modules: The modules.
        children: How many each has, their names, and the `id` of each.
    """

    model: "weakref.ref[nn.Module]"
    paths: list[str]
    modules: "list[weakref.ref[nn.Module]]"
    children: tuple[list[int], list[str], list[int]]


_walks: dict[int, _Walk] = {}
"""The last walk of each model, by its `id`."""


def modules_of(model: nn.Module) -> Modules:
    """All modules of a model and their paths, in the order of `named_modules`, in less time.

    A model is walked once; later calls only compare the children of its modules.
    """
    walk = _walks.get(id(model))
    if walk is not None and walk.model() is model:
        modules = [ref() for ref in walk.modules]
        # While a child lives, no other object has its id.
        if all(m is not None for m in modules) and _children(modules) == walk.children:
            return list(zip(walk.paths, modules, strict=True))  # pyright: ignore
    found, key = _walked(model), id(model)
    paths, modules = map(list, zip(*found, strict=True))
    alive = weakref.ref(model, lambda _: _walks.pop(key, None))
    _walks[key] = _Walk(alive, paths, [weakref.ref(m) for m in modules], _children(modules))
    return found


def _children(modules: Sequence[Any]) -> tuple[list[int], list[str], list[int]]:
    counts: list[int] = []
    names: list[str] = []
    children: list[Any] = []
    for module in modules:
        below = module._modules
        counts.append(len(below))
        if below:
            names += below.keys()
            children += below.values()
    return counts, names, list(map(id, children))


def _walked(model: nn.Module) -> Modules:
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
        if not module._parameters:
            continue
        ahead = path + "." if path else ""
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                if p.requires_grad:
                    found[ahead + name] = p
    return sharded(found, (module for _, module in modules))


def lasting_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """All parameters of a model by name, in the form that lasts from one pass to the next."""
    modules = (module for _, module in modules_of(model))
    return sharded(dict(model.named_parameters()), modules)


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
    """Refuse modules whose layers run, or whose gradients are made, where it is not seen.

    Raises:
        UnsupportedError: One is such a model.
    """
    kinds = {kind: found for kind in {type(m) for _, m in modules} if (found := _wrapper(kind))}
    for path, module in modules if kinds else ():
        name = kinds.get(type(module))
        several = not isinstance(module, nn.DataParallel) or len(module.device_ids) > 1
        if name is not None and several:
            where = f"module {path!r}" if path else "the model itself"
            why, fix = _WRAPPERS[name]
            raise UnsupportedError(f"{where} ({name}): {why}. What to do: {fix}.")


_WRAPPERS = {
    "DataParallel": (
        "its layers run as copies, in threads where they are not seen",
        "use torch.nn.parallel.DistributedDataParallel, which runs a process for each device, or "
        "put its .module on one device",
    ),
    "FullyShardedDataParallel": (
        "its layers use views of one flat parameter, at which all gradients arrive together",
        "shard the model with torch.distributed.fsdp.fully_shard instead, which keeps parameters "
        "apart",
    ),
    "DeepSpeedEngine": (
        "it splits parameters and takes their gradients by hooks of its own",
        "measure a plain copy of the model, or train it with torch.distributed.fsdp.fully_shard or "
        "torch.nn.parallel.DistributedDataParallel",
    ),
}
"""Wrappers of a model, by the name of the class, so that nothing is imported to tell."""


@lru_cache(256)
def _wrapper(kind: type[nn.Module]) -> str | None:
    """The name of the wrapper that a class is, or is made of."""
    return next((c.__name__ for c in kind.__mro__ if c.__name__ in _WRAPPERS), None)


def expect_no_pipeline() -> None:
    """Refuse a backward pass of a pipeline, which is one of several over one batch.

    Raises:
        UnsupportedError: A schedule of `torch.distributed.pipelining` is running.
    """
    if is_in_pipeline():
        raise UnsupportedError(
            "torch.distributed.pipelining: a schedule runs several forward and backward passes of "
            "a stage, over parts of the batch. What to do: measure a copy of the whole model, or "
            "shard it with torch.distributed.fsdp.fully_shard instead."
        )


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Refuse a model of FSDP2.

    Args:
        model: Any module.
        what: The purpose for which it is refused, and the way out.

    Raises:
        UnsupportedError: It is one.
    """
    if fully_sharded(module for _, module in modules_of(model)):
        raise UnsupportedError(f"torch.distributed.fsdp.fully_shard has sharded the model: {what}")
