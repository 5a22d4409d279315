"""Tables of relative positions."""

import functools

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, buffer, linear, normal

D, H, N = 8, 2, 4
"""Features, heads and tokens: as many as examples, and as many as windows where there are some."""

TABLES = Topic("Tables of relative positions")
grid, tokens = normal(B, 4, 4, D), normal(B, N, D)
QKV = {"qkv": linear(D, 3 * D), "out": linear(D, D)}


def index(side: int = 2):
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    far = at[:, None] - at + side - 1
    return far[..., 0] * (2 * side - 1) + far[..., 1]


def projected(m, w):
    return m.qkv(w).reshape(len(w), -1, 3, H, D // H).permute(2, 0, 3, 1, 4)


TABLE = {"table": normal(9, H), "index": buffer(index)}


@TABLES("an index that is a buffer, `T = B`", tokens, **QKV, **TABLE)
def beit(m, x):
    q, k, v = projected(m, x)
    bias = F.embedding(m.index, m.table).permute(2, 0, 1).unsqueeze(0)
    return m.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


@functools.lru_cache
def cached_index(side: int):
    return index(side)


@TABLES("an index kept by `functools.lru_cache`, `T = B`", tokens, **QKV, table=normal(9, H))
def beit_cached(m, x):
    q, k, v = projected(m, x)
    bias = m.table[cached_index(2).view(-1)].view(N, N, H).permute(2, 0, 1)
    return m.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@TABLES("an index that the first pass keeps, `T = B`", tokens, **QKV, table=normal(9, H))
def beit_kept(m, x):
    if not hasattr(m, "kept"):
        m.kept = index()
    q, k, v = projected(m, x)
    bias = m.table[m.kept.view(-1)].view(N, N, H).permute(2, 0, 1)
    return m.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@TABLES(
    "a table indexed in its second dimension (LeViT)",
    tokens,
    **QKV,
    biases=normal(H, 9),
    index=buffer(index),
)
def levit(m, x):
    q, k, v = projected(m, x)
    return m.out(((q @ k.mT + m.biases[:, m.index]).softmax(-1) @ v).transpose(1, 2).flatten(2))


@TABLES(
    "queries times a table for each axis (SAM)",
    grid,
    **QKV,
    tall=normal(7, D // H),
    wide=normal(7, D // H),
)
def decomposed(m, x):
    """As in the image encoder of SAM: a table for each axis, and queries times its rows."""
    q, k, v = projected(m, x.flatten(1, 2))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    far = torch.arange(4)[:, None] - torch.arange(4) + 3
    r = q.view(len(q), 4, 4, -1)
    tall = torch.einsum("bhwc,hkc->bhwk", r, m.tall[far])
    wide = torch.einsum("bhwc,wkc->bhwk", r, m.wide[far])
    a = (q @ k.mT).view(-1, 4, 4, 4, 4) + tall[..., None] + wide[..., None, :]
    x = a.view(-1, 16, 16).softmax(-1) @ v
    return m.out(x.view(-1, H, 16, D // H).transpose(1, 2).reshape(-1, 16, D))
