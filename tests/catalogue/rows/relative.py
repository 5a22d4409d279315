"""Attention that knows how far apart words are, and weights for each head."""

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, linear, normal

D, H = 8, 2
RELATIVE = Topic("Attention with learned distances")
HEADS = Topic("A weight for each head")
sequence, square = normal(B, 5, D), normal(B, B, D)
SIZES = {"": sequence, ", `T = B`": square}
QKV = {name: linear(D, D) for name in ("q", "k", "v", "out")}
KEYLESS = {**QKV, "k": linear(D, D, False)}


def heads(x):
    return x.unflatten(-1, (-1, D // H)).transpose(-3, -2)


def together(x):
    return x.transpose(1, 2).flatten(2)


def distances(t: int, most: int = 3):
    steps = torch.arange(t)
    return (steps[:, None] - steps).clamp(-most, most) + most


@RELATIVE(
    "DeBERTa, `bmm` and `gather`, heads in front",
    SIZES,
    **QKV,
    table=normal(7, D),
    norm_scale=normal(D),
)
def deberta(m, x):
    """Content to position and position to content, heads in front."""
    t = x.shape[1]
    q, k, v = (heads(layer(x)).reshape(-1, t, D // H) for layer in (m.q, m.k, m.v))
    far = distances(t).unsqueeze(0).expand(len(q), -1, -1)
    table = m.norm_scale * m.table.unsqueeze(0)
    pos_k = heads(m.k(table)).repeat(len(x), 1, 1, 1).view(-1, 7, D // H)
    pos_q = heads(m.q(table)).repeat(len(x), 1, 1, 1).view(-1, 7, D // H)
    c2p = torch.gather(torch.bmm(q, pos_k.transpose(-1, -2)), -1, far)
    p2c = torch.gather(torch.bmm(k, pos_q.transpose(-1, -2)), -1, far).transpose(-1, -2)
    a = torch.bmm(q, k.transpose(-1, -2)) + c2p + p2c
    x = torch.bmm(a.softmax(-1), v).view(-1, H, t, D // H)
    return m.out(x.permute(0, 2, 1, 3).reshape(-1, t, D))


@RELATIVE("DeBERTa, keys of positions for all examples", SIZES, **KEYLESS, table=normal(7, D))
def deberta_shared(m, x):
    """The same with one key for all examples, by `matmul`."""
    t = x.shape[1]
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    far = distances(t)
    c2p = torch.matmul(q, heads(m.k(m.table)).transpose(-1, -2))
    a = q @ k.mT + torch.gather(c2p, -1, far.expand(len(x), H, t, t))
    return m.out(together(a.softmax(-1) @ v))


def shifted(a):
    """The diagonals of a as columns, as in Transformer-XL."""
    *front, t, n = a.shape
    a = F.pad(a, (1, 0)).view(*front, n + 1, t)
    return a[..., 1:, :].reshape(*front, t, n)[..., : n // 2 + 1]


def waves(t: int, x):
    at = torch.arange(t - 1, -t, -1, dtype=x.dtype)
    found = at[:, None] / 10 ** torch.linspace(0, 1, D // 2, dtype=x.dtype)
    return torch.cat([found.sin(), found.cos()], -1).unsqueeze(0)


@RELATIVE(
    "Transformer-XL and Conformer, a shift and two learned biases",
    SIZES,
    **KEYLESS,
    pos=linear(D, D, False),
    u=normal(H, 4),
    w=normal(H, 4),
)
def conformer(m, x):
    """Learned biases for content and position, sinusoids through a layer."""
    q = m.q(x).view(len(x), -1, H, D // H)
    k, v = heads(m.k(x)), heads(m.v(x))
    p = m.pos(waves(x.shape[1], x)).view(1, -1, H, D // H).permute(0, 2, 3, 1)
    by_content = (q + m.u).transpose(1, 2) @ k.mT
    by_place = shifted((q + m.w).transpose(1, 2) @ p)
    return m.out(together(((by_content + by_place) / 2).softmax(-1) @ v))


@RELATIVE(
    "keys and values of clipped distances, `einsum`",
    SIZES,
    **KEYLESS,
    table=normal(7, 4),
    values=normal(7, 4),
)
def clipped(m, x):
    """Keys and values of distances, as in Shaw's attention."""
    t = x.shape[1]
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    far_k, far_v = m.table[distances(t)], m.values[distances(t)]
    a = (q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, far_k)).softmax(-1)
    return m.out(together(a @ v + torch.einsum("bhlr,lrd->bhld", a, far_v)))


@RELATIVE(
    "VITS, a table repeated for heads and examples", sequence, **KEYLESS, table=normal(1, 9, 4)
)
def vits(m, x):
    """Tables `[1, 2 T - 1, D]` for all heads, the queries with heads in front."""
    t = x.shape[1]
    q, k, v = (heads(layer(x)).reshape(-1, t, D // H) for layer in (m.q, m.k, m.v))
    far = shifted(torch.matmul(q, m.table.expand(H, -1, -1).repeat(len(x), 1, 1).mT))
    a = (torch.bmm(q, k.mT) + far).softmax(-1)
    return m.out(together(torch.bmm(a, v).view(-1, H, t, D // H)))


@RELATIVE("slopes of heads, added by `baddbmm`", SIZES, **KEYLESS, slopes=normal(H))
def alibi(m, x):
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    far = distances(x.shape[1]).to(x.dtype)
    a = torch.baddbmm(
        (m.slopes.view(H, 1, 1) * far).expand(len(x), -1, -1, -1).flatten(0, 1),
        q.flatten(0, 1),
        k.flatten(0, 1).mT,
        beta=0.5,
    )
    return m.out(together(a.view(-1, H, *far.shape).softmax(-1) @ v))


@RELATIVE(
    "attention pooling, one query `[D]`",
    square,
    k=linear(D, D, False),
    query=normal(D),
    out=linear(D, 3),
)
def pooled(m, x):
    """One learned query, a vector."""
    return m.out(((m.k(x) @ m.query).softmax(-1).unsqueeze(-1) * x).sum(1))


@RELATIVE("learned sinks beside the scores", SIZES, **QKV, sinks=normal(H))
def sinks(m, x):
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    a = torch.cat([q @ k.mT, m.sinks.reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)], -1)
    a = (a - a.max(-1, keepdim=True).values).softmax(-1)
    return m.out(together(a[..., :-1] @ v))


@HEADS(
    "heads mixed by a layer (talking heads)",
    sequence,
    **KEYLESS,
    before=linear(H, 3, False),
    after=linear(3, H),
)
def talking(m, x):
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    a = m.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(-2)
    return m.out(together(m.after(a).permute(0, 3, 1, 2) @ v))


@HEADS(
    "`x[:, None] @ w`, w `[H, D, K]`, `H = B`",
    sequence,
    **{n: normal(B, D, 3) for n in "qkv"},
    out=normal(B, 3, D),
)
def per_head(m, x):
    q, k, v = (x.unsqueeze(1) @ w for w in (m.q, m.k, m.v))
    x = (q @ k.mT).softmax(-1) @ v
    return torch.einsum("bhtk,hkd->btd", x, m.out)


@HEADS("`torch.bmm`, heads in the first dimension", sequence, w=normal(H, 4, 5), b=normal(H, 5))
def grouped(m, x):
    """Blocks of a diagonal, the heads in front of a product."""
    x = x.unflatten(-1, (H, -1)).permute(2, 0, 1, 3)
    x = torch.bmm(x.flatten(1, 2), m.w) + m.b.unsqueeze(1)
    return x.unflatten(1, (-1, sequence().shape[1])).permute(1, 2, 0, 3).flatten(2)


@HEADS(
    "latent attention, weights absorbed by `einsum`",
    sequence,
    q=linear(D, D),
    down=linear(D, 3),
    up_k=normal(H, D // H, 3),
    up_v=normal(H, 3, 4),
)
def latent(m, x):
    """Keys and values of few numbers for all heads, then a matrix for each."""
    c = m.down(x)
    q = torch.einsum("bthk,hkc->bthc", m.q(x).unflatten(-1, (H, -1)), m.up_k)
    a = torch.einsum("bthc,bsc->bhts", q, c).softmax(-1)
    return torch.einsum("bhts,bsc,hck->bthk", a, c, m.up_v).flatten(2)
