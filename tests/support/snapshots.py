"""Everything about a model that a block could leave changed."""

from typing import Any

import torch
from torch import Tensor, nn


def _tensor(x: Tensor | None) -> Any:
    if x is None:
        return None
    hooks = x._backward_hooks, getattr(x, "_post_accumulate_grad_hooks", None)
    flags = x.requires_grad, x.is_leaf, x.grad_fn, type(x), x.shape, x.stride(), x.dtype
    return id(x), x.data_ptr(), flags, *map(_items, hooks), _items(vars(x))


def _items(mapping: Any) -> Any:
    return None if mapping is None else [(key, id(value)) for key, value in mapping.items()]


def _module(module: nn.Module) -> Any:
    """Its attributes by identity, and the contents of those that are dictionaries: hooks too."""
    return {
        key: (id(value), _items(value) if isinstance(value, dict) else None)
        for key, value in vars(module).items()
    }


class Snapshot:
    """Compares equal to another one if nothing at all has changed between them."""

    def __init__(self, model: nn.Module, grads: bool = True) -> None:
        self.modes = torch._C._len_torch_function_stack()
        self.dispatch_modes = torch._C._len_torch_dispatch_stack()
        self.grad_mode = torch.is_grad_enabled()
        self.modules = {name: (id(m), type(m), _module(m)) for name, m in model.named_modules()}
        self.tensors = {
            name: _tensor(x) for name, x in (*model.named_parameters(), *model.named_buffers())
        }
        self.values = {name: x.clone() for name, x in model.state_dict().items()}
        self.grads = {
            name: None if p.grad is None else (id(p.grad), p.grad.clone())
            for name, p in model.named_parameters()
            if grads
        }

    def assert_unchanged(self, model: nn.Module) -> None:
        """Raise if the model differs from what it was."""
        now = Snapshot(model, grads=bool(self.grads))
        for field in ("modes", "dispatch_modes", "grad_mode", "modules", "tensors"):
            assert getattr(now, field) == getattr(self, field), field
        for name, value in self.values.items():
            assert torch.equal(now.values[name], value), name
        for name, before in self.grads.items():
            after = now.grads[name]
            assert (after is None) == (before is None), name
            if before is not None and after is not None:
                assert after[0] == before[0], f"{name}: another .grad"
                assert torch.equal(after[1], before[1]), f"{name}: .grad changed"
