"""Where functions put the dimension of their arguments that is the batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture._folds import FOLDING, ROWS_STAY

FIRST, SECOND = 0, 1
LOST = -1
"""Of a tensor of which functions that are not known leave nothing certain."""

_SWAPS = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes}
_PERMUTES = {Tensor.permute, torch.permute}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_PARTS_OF = {Tensor.chunk, torch.chunk, Tensor.split, torch.split}
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_REDUCTIONS = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("sum", "mean", "amax", "amin", "max", "min", "logsumexp")
}

# What computes each [i, j] of its result from the [i, j] of its arguments.
_STAYS = {
    *(ROWS_STAY - {F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.instance_norm, F.group_norm}),
    *(torch.where, Tensor.masked_fill, Tensor.add_, Tensor.mul_, Tensor.sub_, Tensor.div_),
    *(Tensor.__iadd__, Tensor.__imul__, Tensor.__isub__, Tensor.detach, F.embedding, F.relu_),
    *(F.dropout1d, F.alpha_dropout, F.celu, F.selu, F.glu, F.logsigmoid, torch.relu_),
    *(Tensor.neg, Tensor.__neg__, Tensor.abs, Tensor.sqrt, Tensor.log, Tensor.clamp),
    *(torch.sqrt, torch.log, torch.clamp, torch.sin, torch.cos, torch.flip, Tensor.flip),
    *_PARTS_OF,
}


def moved(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    places: list[tuple[Tensor, int]],
    result: Tensor,
) -> int | None:
    """Which dimension of the result is the batch, from those of the arguments; `None` unknown."""
    x, place = places[0]
    if any(place == LOST for _, place in places):
        return None
    if func in _SWAPS or func in _PERMUTES:
        order = _order(func, x, args[1:])
        found = None if order is None else order.index(place)
    elif func is Tensor.__getitem__:
        found = _kept(x, args[1], place)
    elif func is Tensor.unsqueeze or func is torch.unsqueeze:
        found = place + (args[1] % result.dim() <= place) if len(args) > 1 else None
    elif func is Tensor.squeeze or func is torch.squeeze:
        dims = [d for d in _dims(x, args, kwargs) if x.shape[d] == 1]
        found = _without(dims, place) if result.dim() == x.dim() - len(dims) else None
    elif func in _REDUCTIONS:
        dims = _dims(x, args, kwargs)
        found = _without(dims if result.dim() < x.dim() else [], place)
    elif func in _STAYS:
        first = func in _PRODUCTS or func in FOLDING
        found = next((p for y, p in places[::-1] if _stays(first, args[0], y, p, result)), None)
    else:
        found = None
    return found if found in (FIRST, SECOND) else None


def is_lost(x: Tensor, place: int, result: Tensor) -> bool:
    """Whether it cannot be told which dimension of a result, or part of one, is the batch."""
    if place == LOST:
        return result.dim() > 0
    if result.dim() == 0 or x.dim() < 2 or x.shape[place] < 2:
        return False
    folded = place == SECOND and x.shape[0] > 1 and len(result) == x.shape[0] * x.shape[1]
    return folded or (result.dim() > 1 and x.shape[place] == result.shape[0] == result.shape[1])


def of_sequences(func: Callable[..., Any], args: Sequence[Any]) -> tuple[int, ...]:
    """Where functions that say so have the batch in their results, one after the other."""
    if func is F.multi_head_attention_forward:
        return (SECOND,)
    if func not in RECURRENT or not isinstance(args[-1], bool):
        return ()
    state = args[1] if isinstance(args[1], Tensor) else args[1][0]
    if not state.is_floating_point() or len(args) < 9:
        return ()  # packed
    return (FIRST if args[-1] else SECOND, SECOND, SECOND)


def _order(func: Callable[..., Any], x: Tensor, args: Sequence[Any]) -> list[int] | None:
    """Which dimension of `x` each one of the result is."""
    flat = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if not all(isinstance(d, int) for d in flat) or not flat:
        return None
    dims = [d % x.dim() for d in flat]
    if func in _PERMUTES:
        return dims
    order = list(range(x.dim()))
    order[dims[0]], order[dims[1]] = dims[1], dims[0]
    return order


def _kept(x: Tensor, index: Any, place: int) -> int | None:
    """Where the batch is after indexing, if it is left whole."""
    indices = list(index) if isinstance(index, tuple) else [index]
    if any(i is Ellipsis for i in indices):
        at = next(n for n, i in enumerate(indices) if i is Ellipsis)
        indices[at : at + 1] = [slice(None)] * (x.dim() - len(indices) + 1)
    if not all(isinstance(i, slice) or type(i) is int for i in indices):
        return None
    whole = len(indices) <= place or indices[place] == slice(None)
    return place - sum(type(i) is int for i in indices[:place]) if whole else None


def _dims(x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The dimensions that a function was given; all if none."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = list(given) if isinstance(given, (tuple, list)) else [given]
    if not all(isinstance(d, int) for d in dims):
        return list(range(x.dim()))
    return [d % x.dim() for d in dims]


def _without(dims: Sequence[int], place: int) -> int | None:
    """Where the batch is without some dimensions."""
    return None if place in dims else place - sum(d < place for d in dims)


def _stays(whole: bool, first: Any, x: Tensor, place: int, result: Tensor) -> bool:
    """Whether the batch is where it was; `whole` if that is so of the first argument alone."""
    if result.dim() <= place or x.dim() <= place or x.shape[place] != result.shape[place]:
        return False
    if whole:
        return x is first and x.shape[: place + 1] == result.shape[: place + 1]
    return result.dim() == x.dim()
