"""The time first throughout, and behind layers that take it so."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, mark, normal

T, D = 3, 6
FIRST = Topic("The time first throughout")
sequence, square = normal(B, T, D), normal(B, B, D)
SIZES = {"": sequence, ", `T = B`": square}
WORDS = {"": ids(5, T), ", `T = B`": ids(5, B)}
XLNET = {
    "words": embedding(5, D),
    **{n: normal(D, 2, 3) for n in ("q", "k", "v", "o", "r")},
    **{n: normal(2, 3) for n in ("r_w_bias", "r_r_bias", "r_s_bias")},
    "segments": normal(2, 2, 3),
    "rates": lambda: nn.Buffer(10 ** torch.linspace(-1, 0, 3)),
    "norm": lambda: nn.LayerNorm(D),
    "head": linear(D, 3),
}


@FIRST("XLNet, its words marked", WORDS, **XLNET)
def xlnet(m, ids):
    """Words `[T, B]` throughout, relative positions of all, `einsum` with i, b, n and d."""
    x = m.words(mark(ids.t().contiguous(), dim=1))
    q, k, v = (torch.einsum("ibh,hnd->ibnd", x, w) for w in (m.q, m.k, m.v))
    t = len(x)
    at = torch.arange(t, -t, -1, dtype=x.dtype)
    waves = torch.cat([(at[:, None] * m.rates).sin(), (at[:, None] * m.rates).cos()], -1)
    r = torch.einsum("ih,hnd->ind", waves.type_as(m.r), m.r)
    ac = torch.einsum("ibnd,jbnd->bnij", q + m.r_w_bias, k)
    bd = torch.einsum("ibnd,jnd->bnij", q + m.r_r_bias, r)
    bd = bd.reshape(*bd.shape[:2], 2 * t, t)[:, :, 1:].reshape(*bd.shape[:2], t, 2 * t - 1)
    ef = torch.einsum("ibnd,snd->ibns", q + m.r_s_bias, m.segments)
    same = torch.arange(t)[:, None] // 2 == torch.arange(t) // 2
    ef = torch.einsum("ijs,ibns->bnij", F.one_hot(same.long(), 2).to(x.dtype), ef)
    a = (ac + bd[..., :t] + ef).softmax(-1)
    x = torch.einsum("ibnd,hnd->ibh", torch.einsum("bnij,jbnd->ibnd", a, v), m.o) + x
    return m.head(m.norm(x)).permute(1, 0, 2).contiguous()


@FIRST(
    "marked words into an embedding, then `nn.GRU`",
    WORDS,
    words=embedding(5, D),
    gru=lambda: nn.GRU(D, 5),
    head=linear(5, 3),
)
def marked_gru(m, ids):
    """A new tensor, as a loader gives it: nothing but the mark says whose words they are."""
    ids = torch.tensor(ids.T.tolist())
    return m.head(m.gru(m.words(mark(ids, dim=1)))[0]).transpose(0, 1)


@FIRST(
    "marked words into `nn.TransformerEncoder`",
    WORDS,
    words=embedding(5, D),
    position=normal(5, D),
    encoder=lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 5, 0.0), 1, enable_nested_tensor=False
    ),
    head=linear(D, 3),
)
def marked_encoder(m, ids):
    x = m.words(mark(ids.T, dim=1)) * 2 + m.position[: ids.shape[1]].unsqueeze(1)
    return m.head(m.encoder(x)).mT.permute(2, 0, 1)


@FIRST("heads in the batch behind `nn.LSTM`", SIZES, lstm=lambda: nn.LSTM(D, D), head=linear(D, 3))
def heads_of_steps(m, x):
    """After `nn.LSTM` with the time first, heads in the batch: `[T, B * H, d]`."""
    y, _ = m.lstm(x.transpose(0, 1))
    y = y.reshape(len(y), len(x) * 2, 3).transpose(0, 1)
    a = (y @ y.mT).softmax(-1) @ y
    a = a.transpose(0, 1).reshape(x.shape[1], len(x), 6)
    return m.head(a).transpose(0, 1)


@FIRST(
    "functions of steps behind `nn.GRU`",
    SIZES,
    gru=lambda: nn.GRU(D, 5),
    w=normal(3, 5),
    scale=normal(2),
)
def stepwise(m, x):
    """Functions that a time-first layer leaves: powers, sums along the time, `einsum`."""
    y, _ = m.gru(x.transpose(0, 1))
    y = torch.einsum("tbd,od->tbo", y.square().cumsum(0), m.w).clamp_min(-1).roll(1, 0)
    return torch.stack([y, F.softsign(y).flip(0)], -1).transpose_(0, 1) * m.scale
