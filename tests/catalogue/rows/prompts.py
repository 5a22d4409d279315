"""Prompts, and learned values in place of some."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, buffer, embedding, ids, linear, normal, several

T, D, V = 4, 6, 7
"""As many words as examples."""

PROMPTS = Topic("Prompts")
MASKED = Topic("Learned values in place of some")
sequence = normal(B, T, D)
words = ids(V, T)
ATTENTION = {"words": embedding(V, D), "qkv": linear(D, 3 * D), "head": linear(D, 3)}
TABLE = {"prompt": embedding(3, D)}
LAYERS = {"a": linear(D, D), "head": linear(D, 3), "token": normal(D)}


def attention(x, qkv):
    q, k, v = qkv(x).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


@PROMPTS("looked up once, then repeated", words, **ATTENTION, **TABLE)
def prompt(m, ids):
    """As in peft: rows of a table that all examples share are looked up once, then repeated."""
    prompts = m.prompt(torch.arange(3).unsqueeze(0)).repeat(len(ids), 1, 1)
    x = torch.cat([prompts, m.words(ids)], 1)
    return m.head(attention(x, m.qkv))


@PROMPTS(
    "looked up by ids that the model keeps",
    words,
    **ATTENTION,
    **TABLE,
    ids=lambda: torch.arange(3),
)
def prompt_of_kept_ids(m, ids):
    kept = m.ids.unsqueeze(0).expand(len(ids), -1)[:1]
    x = torch.cat([m.prompt(kept).repeat(len(ids), 1, 1), m.words(ids)], 1)
    return m.head(attention(x, m.qkv))


@PROMPTS(
    "through a network, then repeated (p-tuning)",
    words,
    **ATTENTION,
    **TABLE,
    encoder=lambda: nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, D)),
)
def prompt_encoder(m, ids):
    """P-tuning: the table goes through a network before it is repeated."""
    prompts = m.encoder(m.prompt(torch.arange(3)[None])).repeat(len(ids), 1, 1)
    return m.head(attention(torch.cat([prompts, m.words(ids)], 1), m.qkv))


@PROMPTS(
    "through `nn.LSTM`, then expanded",
    words,
    **ATTENTION,
    **TABLE,
    lstm=lambda: nn.LSTM(D, 3, batch_first=True, bidirectional=True),
    mlp=linear(D, D),
)
def prompt_lstm(m, ids):
    prompts = m.mlp(m.lstm(m.prompt(torch.arange(3)[None]))[0]).expand(len(ids), -1, -1)
    return m.head(attention(torch.cat([prompts, m.words(ids)], 1), m.qkv))


@PROMPTS("keys and values of a prefix", words, **ATTENTION, prefix=embedding(3, 2 * D))
def prefix(m, ids):
    """Keys and values of past positions, a table of which is repeated and cut in two."""
    n = torch.arange(3).unsqueeze(0).expand(len(ids), -1)
    past = m.prefix(n).view(len(ids), 3, 2, 2, D // 2).permute(2, 0, 3, 1, 4)
    q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in m.qkv(m.words(ids)).chunk(3, -1))
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    x = F.scaled_dot_product_attention(q, k, v)
    return m.head(x.transpose(1, 2).flatten(2))


@PROMPTS(
    "of classes, as many as examples (CoOp)",
    normal(B, D),
    prompt=normal(2, D),
    names=buffer(normal(B, 1, D)),
    text=linear(3 * D, 5),
    a=linear(D, 5),
    scale=normal(),
)
def class_prompts(m, x):
    """CoOp: a prompt for all classes, beside a name of each, none of them of an example."""
    prompts = torch.cat([m.prompt.unsqueeze(0).expand(B, -1, -1), m.names.detach()], 1)
    classes = F.normalize(m.text(prompts.flatten(1)), dim=-1)
    return m.scale.exp() * F.normalize(m.a(x), dim=-1) @ classes.t()


def spans(x):
    """Which positions are hidden: of each example some."""
    found = x[..., 0] > x[..., 1]
    found[:, 0] = True
    return found


@MASKED("`x[hidden] = p` (SpecAugment)", sequence, **LAYERS)
def spec_augment(m, x):
    hidden, x = spans(x), m.a(x)
    x[hidden] = m.token.to(x.dtype)
    return m.head(x)


@MASKED("`index_put`", sequence, **LAYERS)
def index_put(m, x):
    return m.head(m.a(x).index_put(spans(x).nonzero(as_tuple=True), m.token))


@MASKED("a sum of two products with a mask", sequence, **LAYERS)
def where(m, x):
    mask = spans(x).unsqueeze(-1).type_as(x)
    return m.head(m.a(x) * (1 - mask) + m.token.expand(len(x), T, -1) * mask)


@MASKED(
    "features of images put among words, `masked_scatter`",
    several(words, sequence),
    words=embedding(V, D),
    a=linear(D, D),
    head=linear(D, 3),
)
def masked_scatter(m, ids, images):
    """Features of images where the words have a placeholder."""
    x = m.words(torch.cat([ids, torch.zeros_like(ids[:, :2])], 1))
    places = torch.cat([ids > V, torch.ones_like(ids[:, :2]) > 0], 1).unsqueeze(-1).expand_as(x)
    return m.head(x.masked_scatter(places, m.a(images[:, :2])))


@MASKED(
    "trained rows over a frozen table, `index_copy`",
    words,
    table=buffer(normal(V, D)),
    rows=normal(4, D),
    head=linear(D, 3),
)
def new_words(m, ids):
    """A few rows of a frozen table are trained, put over it."""
    return m.head(F.embedding(ids, m.table.detach().index_copy(0, torch.arange(4), m.rows)))


@MASKED(
    "`torch.where` of a token",
    words,
    words=embedding(V, D),
    token=normal(D),
    head=linear(D, 3),
)
def dropped_labels(m, ids):
    """Classifier-free guidance: a learned row in place of some labels."""
    x = m.words(ids)
    return m.head(torch.where((ids > 3).unsqueeze(-1), m.token, x))
