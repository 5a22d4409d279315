"""Learned tokens beside what the examples gave."""

import torch
from torch import nn

from catalogue.row import B, Topic, embedding, linear, normal, uses
from catalogue.rows.prompts import attention

T, D = 4, 6
"""As many words as examples."""

TOKENS = Topic("Learned tokens beside those of examples")
sequence, other = normal(B, T, D), normal(B, 5, D)
DECODER = {
    "inputs": linear(D, D),
    "queries": embedding(B, D),
    "decoder": lambda: nn.TransformerDecoderLayer(D, 2, 5, 0.0),
    "norm": lambda: nn.LayerNorm(D),
    "head": linear(D, 3),
}
LAYERS = {"a": linear(D, D), "head": linear(D, 3), "token": normal(D)}


@TOKENS(
    "ViT-MAE, patches left out and put back by `gather`",
    lambda: (sequence(), torch.rand(B, T)),
    **{n: linear(D, D) for n in ("embed", "encode", "decode")},
    **{n: normal(1, 1, D) for n in ("cls", "token")},
    **{n: normal(1, T + 1, D) for n in ("places", "places_too")},
)
def masked_autoencoder(m, x, noise):
    """Some patches left out by `gather`; tokens put where they were, by `gather` again."""
    order = noise.argsort(1)
    back = order.argsort(1)
    kept = order[:, :2].unsqueeze(-1).expand(-1, -1, D)
    x = torch.gather(m.embed(x) + m.places[:, 1:], 1, kept)
    cls = (m.cls + m.places[:, :1]).expand(len(x), -1, -1)
    x = m.encode(torch.cat([cls, x], 1)).tanh()
    tokens = m.token.repeat(len(x), back.shape[1] + 1 - x.shape[1], 1)
    y = torch.cat([x[:, 1:], tokens], 1)
    y = torch.gather(y, 1, back.unsqueeze(-1).repeat(1, 1, D))
    y = torch.cat([x[:, :1], y], 1) + m.places_too
    return m.decode(y - y.mean(1, keepdim=True))[:, 1:]


@TOKENS(
    "TimeSformer, frames and patches folded in turn",
    normal(B, 2, 4, D),
    temporal=linear(D, 3 * D),
    spatial=linear(D, 3 * D),
    out=linear(D, D),
    head=linear(D, 3),
    cls=normal(1, 1, D),
    time=normal(2, D),
    space=normal(1, 4, D),
)
def space_time(m, x):
    """TimeSformer: frames, then patches, folded into the batch; one class token for all."""
    b, t, p = len(x), 2, 4
    cls = m.cls.expand(b, 1, -1)
    h = x.permute(0, 2, 1, 3).reshape(b * p, t, D) + m.time
    h = x + m.out(attention(h, m.temporal)).view(b, p, t, D).transpose(1, 2)
    frames = cls.repeat(1, t, 1).reshape(b * t, 1, D)
    y = torch.cat([frames, h.reshape(b * t, p, D) + m.space], 1)
    y = attention(y, m.spatial)
    cls = cls + y[:, 0].view(b, t, D).mean(1, keepdim=True)
    return m.head(torch.cat([cls, h.flatten(1, 2) + y[:, 1:].reshape(b, t * p, D)], 1))


@TOKENS(
    "DETR, positions of columns beside those of rows",
    normal(B, 2, B, 3),
    column=embedding(5, 3),
    row=embedding(5, 3),
    a=lambda: nn.Conv2d(2, D, 1),
    head=linear(D, 3),
)
def columns_and_rows(m, x):
    """Positions of DETR: half of them for columns, half for rows."""
    h, w = x.shape[-2:]
    column, row = m.column(torch.arange(w)), m.row(torch.arange(h))
    p = torch.cat([column.unsqueeze(0).repeat(h, 1, 1), row.unsqueeze(1).repeat(1, w, 1)], -1)
    p = p.permute(2, 0, 1).unsqueeze(0).repeat(len(x), 1, 1, 1)
    x = (m.a(x) + p).flatten(2).permute(0, 2, 1)
    return m.head(x * p.flatten(2).mT)


def queries_time_first(way):
    """A decoder of DETR, as written for the default of torch, `[Q, B, D]`."""

    def function(m, x):
        memory = m.inputs(x).transpose(0, 1)
        q = m.queries.weight.unsqueeze(1)
        q = q.repeat(1, len(x), 1) if way == "repeat" else q.expand(-1, len(x), -1)
        return m.head(m.norm(m.decoder(q, memory)).transpose(0, 1))

    return function


@TOKENS(
    "learned queries added in attention, the time first",
    other,
    inputs=linear(D, D),
    queries=embedding(B, D),
    own=lambda: nn.MultiheadAttention(D, 2),
    other=lambda: nn.MultiheadAttention(D, 2),
    head=linear(D, 3),
)
def queries_added(m, x):
    """Zeros for targets, learned queries added in attention."""
    memory = m.inputs(x).transpose(0, 1)
    places = m.queries.weight.unsqueeze(1).repeat(1, len(x), 1)
    target = torch.zeros_like(places)
    q = target + places
    target = target + m.own(q, q, target + places, need_weights=False)[0]
    return m.head(target + m.other(target + places, memory, memory)[0]).transpose(0, 1)


@TOKENS(
    "Perceiver, as many latents as examples",
    other,
    latents=normal(B, D),
    q=linear(D, D),
    k=linear(D, D, False),
    out=linear(2 * D, 3),
)
def perceiver(m, x):
    latents = m.latents.unsqueeze(0).expand(len(x), -1, -1)
    a = (m.q(latents) @ m.k(x).mT).softmax(-1)
    latents = latents + a @ x
    return m.out(torch.cat([latents, m.q(latents)], -1))


@TOKENS("written into zeros", sequence, **LAYERS)
def first_columns(m, x):
    """Written into zeros, the token by a number for each example."""
    y = x.new_zeros(len(x), T + 1, D)
    y[:, 0] = m.token
    y[:, 1:] = m.a(x)
    return m.head(y)


@TOKENS("activations written into a tiled token", sequence, **LAYERS)
def tiled(m, x):
    y = m.token.tile(len(x), T, 1)
    y[:, 1] = m.a(x)[:, 0]
    return m.head(y * x)


@TOKENS("activations written into a token plus zeros", sequence, **LAYERS)
def with_zeros(m, x):
    y = m.token + torch.zeros(len(x), T, D, dtype=x.dtype)
    y[:, 0] = m.a(x)[:, 0]
    return m.head(y * x)


for way in ("repeat", "expand"):
    TOKENS.add(
        f"learned queries `[Q, B, D]` by `{way}` into `nn.TransformerDecoderLayer`, `Q = B`",
        uses(queries_time_first(way), **DECODER),
        other,
    )
