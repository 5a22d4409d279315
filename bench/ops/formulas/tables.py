"""Embedding tables as plain torch does them, shared by the ops on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.ways import widen


def unpadded(ids: Tensor, g: Tensor, padding_idx: int) -> Tensor:
    """Output gradients, zero where the row gets none."""
    g = widen(g)
    return g if padding_idx < 0 else g.masked_fill((ids == padding_idx).unsqueeze(-1), 0)


def gradients(ids: Tensor, g: Tensor, num_embeddings: int) -> Tensor:
    """`[B, V, D]`."""
    rows = g.new_zeros(len(g), num_embeddings, g.shape[2])
    return rows.scatter_add_(1, ids.unsqueeze(-1).expand_as(g), g)


def pairs(ids: Tensor, g: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Example, table row and gradient of each row that an example touches."""
    keys = ids + num_embeddings * torch.arange(len(ids), device=ids.device).unsqueeze(1)
    found, inverse = torch.unique(keys.flatten(), return_inverse=True)
    rows = g.new_zeros(len(found), g.shape[2]).index_add_(0, inverse, g.flatten(0, 1))
    return found // num_embeddings, found % num_embeddings, rows


def weighted_sum(ids: Tensor, g: Tensor, num_embeddings: int, coef: Tensor | None) -> Tensor:
    """The ordinary gradient of the table."""
    scaled = g if coef is None else g * coef.view(-1, 1, 1)
    backward = torch.ops.aten.embedding_dense_backward
    return backward(scaled, ids, num_embeddings, -1, False)


def dots(ids: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    return (F.embedding(ids, direction) * g).sum((1, 2))


def same_row_products(ids1: Tensor, g1: Tensor, ids2: Tensor, g2: Tensor) -> Tensor:
    """`[..., T1, T2]`, products of output gradients, zero where their table rows differ."""
    return (g1 @ g2.mT).mul_(ids1.unsqueeze(-1) == ids2.unsqueeze(-2))
