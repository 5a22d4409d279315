"""Tensors whose first dimension is the batch and its positions, one example after the other."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDING = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten}

# What leaves rows where they are.
ROWS_STAY = {
    *FOLDING,
    *(F.linear, F.layer_norm, F.group_norm, F.rms_norm, F.batch_norm, F.instance_norm),
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(F.relu, F.gelu, F.silu, F.elu, F.leaky_relu, F.sigmoid, F.tanh, F.softplus, F.hardtanh),
    *(F.relu6, F.hardswish, F.mish, F.prelu, F.dropout, F.softmax, F.log_softmax, F.normalize),
    *(torch.relu, torch.tanh, torch.sigmoid, torch.exp, torch.pow, torch.softmax, torch.addmm),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.cat),
    *(Tensor.relu, Tensor.tanh, Tensor.sigmoid, Tensor.exp, Tensor.pow, Tensor.softmax),
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.matmul, Tensor.__matmul__),
    *(Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__, Tensor.__pow__),
    *(Tensor.__radd__, Tensor.__rsub__, Tensor.__rmul__, Tensor.__rtruediv__),
    *(Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type),
    *(Tensor.contiguous, Tensor.clone, Tensor.type_as, Tensor.unsqueeze, Tensor.squeeze),
}


class Folds:
    """Remembers what was flattened from `[B, T, ...]` to `[B T, ...]`."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def of(self, x: Tensor) -> int:
        """How many rows of a tensor belong to one row of the batch."""
        ref, rows = self._known.get(id(x), (None, 0))
        return x.shape[0] // rows if ref is not None and ref() is x else 1

    def copy(self, others: Sequence[Tensor], x: Tensor) -> None:
        """Take a tensor's rows for those of others with as many."""
        for other in others:
            if other.shape[:1] == x.shape[:1] and self.of(other) > 1:
                self._known[id(x)] = weakref.ref(x), x.shape[0] // self.of(other)

    def follow(
        self, func: Callable[..., Any], args: Sequence[Any], result: Any, rows: int | None
    ) -> None:
        """Look at a call of a torch function.

        Args:
            func: The function.
            args: Its positional arguments.
            result: What it returned.
            rows: Of the batch; `None` if that is not known.
        """
        first = args[0] if args else None
        if not isinstance(first, Tensor) or not isinstance(result, Tensor):
            return
        if not first.dim() or not result.dim() or func not in ROWS_STAY:
            return
        fold = max(self.of(x) if isinstance(x, Tensor) else 1 for x in args)
        if fold > 1 and first.shape[0] == result.shape[0]:
            self._known[id(result)] = weakref.ref(result), first.shape[0] // fold
        elif fold == 1 and func in FOLDING and first.dim() > 1 and first.shape[0]:
            begins = rows in (None, first.shape[0])
            if begins and result.shape[0] > first.shape[0] > 0 == result.shape[0] % first.shape[0]:
                self._known[id(result)] = weakref.ref(result), first.shape[0]
