"""From an `OpSpec` to `torch.ops.pycoherence.<op>`: what anyone who has the tensors calls."""

from itertools import islice
from typing import Any

import torch
from torch.autograd import forward_ad

from pycoherence.ops.core.dispatch import NATIVE_NAMESPACE, select
from pycoherence.ops.core.mistakes import raise_explained
from pycoherence.ops.core.spec import OpSpec, Outputs, device_type

NAMESPACE = "pycoherence"

specs: dict[str, OpSpec] = {}
"""Every registered op, by name."""

_public = torch.library.Library(NAMESPACE, "FRAGMENT")
_native = torch.library.Library(NATIVE_NAMESPACE, "FRAGMENT")


def register(spec: OpSpec) -> OpSpec:
    """Define the op for torch: schemas, picker, fake kernel, and a backward that raises."""
    for library in (_public, _native):
        library.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), spec.name).default

    def run(*args: Any) -> Outputs:
        spec.check(*args)
        try:
            return select(spec, device_type(args), args).kernel(*args)
        except RuntimeError as error:
            raise_explained(spec, args, error)

    def fake(*args: Any) -> Outputs:
        spec.check(*args)
        return spec.fake(*args)

    # torch.library.register_autograd would do the same at four times the cost of a call.
    def autograd(*args: Any) -> Outputs:
        backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if backward or forward_ad._current_level >= 0:
            # A list hides its tensors from torch.
            sizes = [len(x) if isinstance(x, list) else None for x in args]
            flat = [y for x in args for y in (x if isinstance(x, list) else [x])]
            return _NotDifferentiable.apply(op, sizes, *flat)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _public.impl(spec.name, run, "CompositeExplicitAutograd")
    _public.impl(spec.name, autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", fake, lib=_public)
    specs[spec.name] = spec
    return spec


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, sizes: list[int | None], *flat: Any) -> Outputs:
        ctx.op, rest = op, iter(flat)
        args = [next(rest) if n is None else list(islice(rest, n)) for n in sizes]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{ctx.op} is not differentiable; call it under torch.no_grad() or on x.detach()"
        )
