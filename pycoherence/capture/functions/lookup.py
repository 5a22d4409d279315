"""Elements of a parameter picked by indices of examples: `table[ids]`, `gather` and their kin."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition
from pycoherence.capture.facts import PARAMETERS


@register_decomposition(Tensor.__getitem__)
def getitem(c: CallContext, input: Tensor, index: Any) -> Any:
    if c.facts(input).kind != PARAMETERS:
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype != torch.bool and input.dim():
        return _rows(c, input, index)
    return _elements(c, input, lambda places: places[index], index)


@register_decomposition(torch.index_select, Tensor.index_select)
def index_select(c: CallContext, input: Tensor, dim: int, index: Tensor) -> Any:
    if c.facts(input).kind != PARAMETERS:
        return NotImplemented
    with c.tracked():
        first = input.movedim(dim, 0) if dim % input.dim() else input
    found = _rows(c, first, index)
    with c.tracked():
        return found.movedim(0, dim) if dim % input.dim() else found


@register_decomposition(torch.gather, Tensor.gather)
def gather(c: CallContext, input: Tensor, dim: int, index: Tensor, **options: Any) -> Any:
    if c.facts(input).kind != PARAMETERS or options:
        return NotImplemented
    return _elements(c, input, lambda places: places.gather(dim, index), index)


@register_decomposition(torch.take, Tensor.take)
def take(c: CallContext, input: Tensor, index: Tensor) -> Any:
    if c.facts(input).kind != PARAMETERS:
        return NotImplemented
    return _elements(c, input, lambda places: places.take(index), index)


def _rows(c: CallContext, table: Tensor, ids: Tensor) -> Any:
    """Whole rows of a table."""
    with c.tracked():
        rest = table.shape[1:]
        flat = table.reshape(table.shape[0], -1) if table.dim() != 2 else table
        ids = torch.where(ids < 0, ids + table.shape[0], ids)
        found = F.embedding(ids, flat)
        return found if table.dim() == 2 else found.reshape(*ids.shape, *rest)


def _elements(c: CallContext, p: Tensor, pick: Any, index: Any) -> Any:
    """Single elements: rows of one number of the flattened parameter."""
    places = pick(torch.arange(p.numel(), device=p.device).view(p.shape))
    owner = c.owner_by_index(p, pick, index)
    if owner is None:
        return NotImplemented
    c.mark(places, owner)
    with c.tracked():
        return F.embedding(places, p.reshape(-1, 1)).squeeze(-1)
