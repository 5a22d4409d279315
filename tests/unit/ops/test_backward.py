"""The ops carry no derivative; a backward pass through one must say so."""

import warnings
from typing import Any

import pytest
import torch
from support.backends import backends_of, each_float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

import pycoherence as pc

CASES = [(op, backend) for op in pc.ops.specs for backend in backends_of(op)]


def differentiable(op: str) -> tuple[Any, ...]:
    args = next(iter(pc.ops.specs[op].samples("cpu", torch.float32)))
    return each_float(Tensor.requires_grad_, args)


def total(outputs: Any) -> torch.Tensor:
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return torch.stack([out.sum() for out in outputs]).sum()


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_backward_raises(op: str, backend: str) -> None:
    with pc.backend(backend):
        loss = total(getattr(torch.ops.pycoherence, op)(*differentiable(op)))
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match=rf"{op}.* not differentiable.*no_grad"):
        loss.backward()


@pytest.mark.parametrize("op", pc.ops.specs)
def test_each_differentiable_argument_raises_alone(op: str) -> None:
    args = next(iter(pc.ops.specs[op].samples("cpu", torch.float32)))
    leaves, tree = tree_flatten(args)
    for i, x in enumerate(leaves):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            alone = [*leaves[:i], x.clone().requires_grad_(), *leaves[i + 1 :]]
            loss = total(getattr(torch.ops.pycoherence, op)(*tree_unflatten(alone, tree)))
            with pytest.raises(RuntimeError, match="not differentiable"):
                loss.backward()


@pytest.mark.parametrize("op", pc.ops.specs)
def test_runs_without_a_graph_under_no_grad(op: str) -> None:
    with torch.no_grad():
        assert not total(getattr(torch.ops.pycoherence, op)(*differentiable(op))).requires_grad
    with torch.inference_mode():
        args = next(iter(pc.ops.specs[op].samples("cpu", torch.float32)))
        assert not total(getattr(torch.ops.pycoherence, op)(*args)).requires_grad


def test_forward_mode_raises() -> None:
    """Else a tangent would be dropped in silence."""
    x, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    with warnings.catch_warnings():  # torch's own, when forward mode is first used
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            pc.ops.linear_reduce(forward_ad.make_dual(x, torch.ones_like(x)), g)
