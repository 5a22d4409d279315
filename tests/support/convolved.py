"""Convolutions for tests of Triton kernels: how they are asked for, and what must come out."""

from typing import Any

import torch
from torch import Tensor

import pycoherence as pc
from support.backends import TOLERANCE, assert_close, assert_reduced_close, in_float64


def run(op: str, *args: Any) -> Any:
    with pc.backend("triton"):
        return getattr(torch.ops.pycoherence, op)(*args)


def check(*args: Any, what: str = "", tolerance: float = 0.0) -> None:
    """All outputs of conv_reduce."""
    expected = pc.ops.specs["conv_reduce"].reference(*in_float64(args))
    tolerance = tolerance or TOLERANCE[args[0].dtype]
    assert_reduced_close(run("conv_reduce", *args), expected, tolerance, what)


def check_gram(head: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Dot products of a batch with itself, which are symmetric to the bit, and with another."""
    for two in ((None, None), other[:2]):
        args = (*head[:2], *two, *head[2:])
        found = run("conv_gram", *args)
        assert_close(found, pc.ops.specs["conv_gram"].reference(*in_float64(args)), 1e-5)
        assert two[0] is not None or torch.equal(found, found.mT)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
