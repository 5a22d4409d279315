"""Tables looked up by ids `[B]`: recommenders, classes, hashes."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, several

V, D = 7, 6
CODES = "vector quantisation, codes of flattened positions"
LOOKED_UP = Topic("Ids `[B]`, one for an example")


PAIR = several(ids(V), ids(V))
TABLES = {"users": embedding(V, D), "items": embedding(V, D)}


@LOOKED_UP(
    "matrix factorisation, biases of users and items",
    PAIR,
    **TABLES,
    user_bias=embedding(V, 1),
    item_bias=embedding(V, 1),
    mean=normal(),
)
def factorised(m, user, item):
    score = (m.users(user) * m.items(item)).sum(1)
    return (score + m.user_bias(user).squeeze(1) + m.item_bias(item)[:, 0] + m.mean).unsqueeze(1)


@LOOKED_UP("users times items by `bmm`", PAIR, **TABLES)
def with_bmm(m, user, item):
    return torch.bmm(m.users(user).unsqueeze(1), m.items(item).unsqueeze(2)).view(-1, 1)


@LOOKED_UP("users times the whole table of items", PAIR, **TABLES, bias=normal(V))
def two_towers(m, user, item):
    """All items of the table are scored."""
    return F.log_softmax(m.users(user) @ m.items.weight.t() + m.bias, -1) * F.one_hot(item, V)


FIELDS = several(normal(B, 3), ids(V, 2))


@LOOKED_UP(
    "DLRM, dots of all pairs of tables",
    FIELDS,
    bottom=linear(3, D),
    tables=lambda: nn.ModuleList(nn.Embedding(V, D) for _ in range(2)),
    top=linear(D + 3, 3),
)
def dlrm(m, dense, sparse):
    """Dots of all pairs of vectors of an example, their lower triangle."""
    x = m.bottom(dense)
    x = torch.stack([x, *(t(i) for t, i in zip(m.tables, sparse.unbind(1), strict=True))], 1)
    dots = torch.bmm(x, x.transpose(1, 2))
    i, j = torch.tril_indices(x.shape[1], x.shape[1], -1)
    return m.top(torch.cat([x[:, 0], dots[:, i, j]], 1))


@LOOKED_UP(
    "a factorisation machine, fields in one table",
    FIELDS,
    table=embedding(2 * V, D),
    linear=embedding(2 * V, 1),
    fields=normal(3, D),
    wide=linear(3, 1, False),
    deep=linear(5 * D, 3),
)
def factorisation_machine(m, dense, sparse):
    """One table for all fields, an offset for each."""
    sparse = sparse + torch.arange(2) * V
    v = torch.cat([m.table(sparse), dense.unsqueeze(-1) * m.fields], 1)
    cross = v.sum(1).square() - v.square().sum(1)
    first = m.linear(sparse).sum(1) + m.wide(dense)
    return torch.cat([first, m.deep(v.flatten(1)), cross.sum(1, keepdim=True) / 2], 1)


@LOOKED_UP(
    "deep and cross, `x @ w` with a vector",
    FIELDS,
    table=embedding(V, D),
    **{n: normal(3 + 2 * D) for n in ("w1", "b1", "w2", "b2")},
    head=linear(3 + 2 * D, 3),
)
def crossed(m, dense, sparse):
    """Deep and cross: a vector of each layer times the input, vectors by `matmul`."""
    x = first = torch.cat([dense, m.table(sparse).flatten(1)], 1)
    for w, b in ((m.w1, m.b1), (m.w2, m.b2)):
        x = first * (x @ w).unsqueeze(1) + b + x
    return m.head(x)


@LOOKED_UP(
    "word2vec, one word and some of its context",
    several(ids(V), ids(V, 4)),
    words=embedding(V, D),
    out=embedding(V, D),
)
def negatives(m, centre, context):
    """word2vec: one word, some of its context and others."""
    found = m.out(context) @ m.words(centre).unsqueeze(2)
    return F.logsigmoid(found.squeeze(2) * torch.tensor([1, 1, -1, -1]))


@LOOKED_UP("`table[ids]`", ids(V), table=normal(V, D), head=linear(D, 3))
def direct(m, item):
    return m.head(m.table[item])


@LOOKED_UP(
    "triples of a knowledge graph, a matrix for each relation",
    several(ids(V), ids(2), ids(V)),
    things=embedding(V, D),
    relations=embedding(2, D),
    matrices=normal(2, D * D),
)
def translated(m, head, relation, tail):
    """TransE, and a matrix for each relation (RESCAL)."""
    h, t = F.normalize(m.things(head), dim=-1), F.normalize(m.things(tail), dim=-1)
    far = (h + m.relations(relation) - t).norm(dim=-1)
    w = m.matrices[relation].view(-1, D, D)
    return torch.stack([far, (h.unsqueeze(1) @ w @ t.unsqueeze(2)).view(-1)], 1)


@LOOKED_UP(
    "a scale and a shift of each class",
    several(normal(B, 2, 5), ids(V)),
    table=embedding(V, 8),
    a=lambda: nn.Conv1d(2, 4, 1),
    head=linear(5, 3),
)
def conditional(m, x, y):
    """A scale and a shift of each class."""
    scale, shift = m.table(y).chunk(2, 1)
    return m.head(F.group_norm(m.a(x), 2) * (1 + scale)[:, :, None] + shift[:, :, None])


@LOOKED_UP("one-hot vectors times a table", ids(V), w=normal(V, D), head=linear(D, 3))
def one_hot(m, y):
    return m.head((F.one_hot(y, V).to(m.w.dtype) @ m.w).tanh())


@LOOKED_UP(
    "a conditional random field, `p[y, z]`",
    several(normal(B, 4, D), ids(3, 4)),
    a=linear(D, 3),
    moves=normal(3, 3),
    first=normal(3),
)
def crf(m, x, y):
    """Transitions `[K, K]` looked up by pairs of labels, and summed over by `logsumexp`."""
    scores = m.a(x)
    own = scores.gather(2, y.unsqueeze(2)).squeeze(2).sum(1)
    own = own + m.moves[y[:, :-1], y[:, 1:]].sum(1) + m.first[y[:, 0]]
    alpha = scores[:, 0] + m.first
    for t in range(1, x.shape[1]):
        alpha = (alpha.unsqueeze(2) + m.moves + scores[:, t].unsqueeze(1)).logsumexp(1)
    return (alpha.logsumexp(1) - own).unsqueeze(1)


@LOOKED_UP(
    "hashes of characters, and fewer positions (CANINE)",
    ids(50, 8),
    tables=lambda: nn.ModuleList(nn.Embedding(V, 3) for _ in range(2)),
    places=embedding(9, D),
    norm=lambda: nn.LayerNorm(D),
    conv=lambda: nn.Conv1d(D, D, 3, 2),
    head=linear(2 * D, 3),
)
def canine(m, code):
    """Hashes of characters, a table for each, then a convolution that makes fewer positions."""
    x = torch.cat([t((code + 1) * p % V) for t, p in zip(m.tables, (3, 5), strict=True)], -1)
    x = m.norm(x + m.places.weight[: code.shape[1]])
    less = m.conv(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
    less = torch.cat([x[:, :1], less[:, :-1]], 1)
    back = torch.repeat_interleave(less, 2, dim=1)
    return m.head(torch.cat([x, back], -1))


@LOOKED_UP("a hash grid of corners", normal(B, 3, 2), grid=normal(V, D), head=linear(D, 3))
def hash_grid(m, x):
    """Corners of cells looked up, `[B, n, 4]`, weighted by how near they are."""
    at = x.sigmoid() * 3
    low = at.floor()
    corners = low.unsqueeze(2) + torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    index = (corners[..., 0].long() * 31 + corners[..., 1].long() * 17) % len(m.grid)
    weight = (1 - (at.unsqueeze(2) - corners).abs()).prod(-1, keepdim=True)
    return m.head((m.grid[index.flatten()].view(*index.shape, -1) * weight).sum(2))


@LOOKED_UP(
    CODES, normal(B, 3, D), "fallback", a=linear(D, D), codes=embedding(3, D), head=linear(2 * D, 3)
)
def vector_quantised(m, x):
    """The nearest code of each position, straight through, and what pulls codes along."""
    x = m.a(x)
    flat = x.reshape(-1, D)
    nearest = torch.cdist(flat, m.codes.weight).argmin(1)
    q = F.embedding(nearest, m.codes.weight).view_as(x)
    return m.head(torch.cat([x + (q - x).detach(), (q - x.detach()).square()], -1))
